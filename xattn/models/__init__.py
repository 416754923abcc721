"""One file a family; names and numbers in zoo.py."""

from xattn.models.timm_names import register_names

register_names()
