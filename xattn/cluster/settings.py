"""The `cluster` section of params.yaml; reading it needs no Ray."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ClusterConfig(BaseModel):
    """Where and on how many processes a run trains. None of it changes what is trained on.

    Args:
        backend: "ray" attaches to RAY_ADDRESS or starts a cluster on this machine; "process" trains
            in this very process, or in those that torchrun started.
        workers: training processes of a run.
        device: "auto" takes a GPU for each worker where there are enough.
        cpus_per_worker: cores that Ray keeps for each worker, and its number of torch threads.
        max_failures: how often a run is continued after a worker died.
        loader_threads: decoding threads of each worker; 0 decodes between the steps. By default 6
            beside a GPU, and none where the training itself takes the cores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["ray", "process"] = "ray"
    workers: int = Field(default=2, gt=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus_per_worker: int = Field(default=1, gt=0)
    max_failures: int = Field(default=2, ge=0)
    loader_threads: int | None = Field(default=None, ge=0, le=256)
