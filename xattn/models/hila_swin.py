"""HILA on Swin: Leung et al., arXiv 2207.02126, the rows "Swin-T + S(2,3,4)" of tables 1 and 5.

The exchanges read and change the maps before the norms. Written from the paper and from numbers
measured on the authors' code (fidler-lab/hila, 572d62f; no code taken). Differences from it, all of
them repairs, besides those of `hila`:
- The refined low map is normed once, at the end; there, after every block that no top-down update
  follows, which for stage 3 is mid-way too.
- The low block's windows are shifted in its first turn of every forward pass and then alternate;
  there they alternate over all calls since the model was loaded.
- The low block's FFN has four times the channels, as the block of which it is a copy and as the
  paper's 68.5 M parameters need; there it starts with twice, and a trained one does not load again.
- A stage without exchange leaves the one before its own normed output; there, the un-normed one.
"""

from collections.abc import Sequence

from xattn.models.hila import ExchangeConfig, Hila
from xattn.models.swin import build_stages
from xattn.nn.blocks import drop_path_rates


class HilaSwin(Hila):
    """Swin with inter-level attention in some stages; its plain part has Swin's key names.

    Args:
        dims, depths, heads, window, mlp_ratio, drop_path, shifts_lone_window: of the Swin, see
            `swin.build_stages`. Updates are dropped at the rate of their stage's first block.
        stages, stride, exchange: see `Hila`.

    Raises:
        ConfigError: `stages` or `stride` make no sense for these depths.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        window: int = 7,
        mlp_ratio: int = 4,
        drop_path: float = 0.3,
        shifts_lone_window: bool = True,
        stages: Sequence[int] = (2, 3, 4),
        stride: int | Sequence[int] = (1, 2, 1),
        exchange: ExchangeConfig | None = None,
    ) -> None:
        built = build_stages(dims, depths, heads, window, mlp_ratio, drop_path, shifts_lone_window)
        super().__init__(
            built,
            dims,
            stages,
            stride,
            exchange or ExchangeConfig(ffn_ratio=2),
            hands_on_normed=False,
            drop_paths=[rates[0] for rates in drop_path_rates(depths, drop_path)],
            takes_turns=True,
        )
