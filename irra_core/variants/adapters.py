"""CLIP and a recipe → the same CLIP of which less learns: encoders frozen, or with low-rank adapters.

peft cannot serve here: it adds its change in the forward pass of the module that it wraps, and this library reads
matrices directly (an attention's in_proj_weight in parts). torch's own parametrisation gives the changed matrix to
whoever reads it.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from irra_core.transformer import CLIP

MATRICES = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # of a block


class LowRank(nn.Module):
    """A matrix → that matrix plus up @ down, a change of rank `rank` at most; none at first, as `up` begins at zero.

    Source: LoRA (Hu et al., ICLR 2022), section 4.1, with scale 1: here the learning rate alone sets the pace.
    """

    def __init__(self, matrix: Float[Tensor, "rows cols"], rank: int):
        super().__init__()
        rows, cols = matrix.shape
        self.down = nn.Parameter(matrix.new_empty(rank, cols).normal_(std=cols**-0.5))
        self.up = nn.Parameter(matrix.new_zeros(rows, rank))

    def forward(self, matrix: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        device = "cpu" if matrix.is_meta else matrix.device.type  # autocast knows no device meta
        with torch.autocast(device, enabled=False):  # so that the merged matrix is this one bit for bit
            return matrix + self.up @ self.down


def limit_learning(clip: CLIP, frozen: str, rank: int) -> None:
    """Freeze the encoders named by `frozen`, and give the matrices of the others adapters where `rank` is not 0.

    Nothing else of an encoder with adapters learns: no embedding, bias, LayerNorm or projection. Autograd keeps no
    activation of an encoder in which nothing learns. Adapters are drawn from torch's random state. Raises ValueError
    for a rank that is not below the matrices' own.
    """
    for name, parameter in clip.named_parameters():
        side = "image" if name.startswith("visual.") else "text"
        parameter.requires_grad_(not rank and frozen not in (side, "both"))
    if rank and frozen != "image":
        _add_adapters(clip.visual.transformer.resblocks, rank)
    if rank and frozen != "text":
        _add_adapters(clip.transformer.resblocks, rank)


def _add_adapters(blocks: nn.ModuleList, rank: int) -> None:
    """Give each matrix of transformer blocks a low-rank change."""
    for block in blocks:
        for place in MATRICES:
            owner, _, name = place.rpartition(".")
            module = block.get_submodule(owner)
            matrix = getattr(module, name)
            if rank >= min(matrix.shape):
                raise ValueError(
                    f"adapter_rank {rank}: this backbone has matrices of {'×'.join(map(str, matrix.shape))}, and a "
                    f"low-rank change of them is one of rank below {min(matrix.shape)}; 4 to 64 are usual"
                )
            parametrize.register_parametrization(module, name, LowRank(matrix, rank))


def is_adapter(name: str) -> bool:
    """True for the name of a parameter of an adapted matrix: `up` and `down`, or the frozen `original`."""
    return ".parametrizations." in name


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the same model without adapters: each adapted matrix as the forward pass takes it."""
    state = {name: value for name, value in model.state_dict().items() if not is_adapter(name)}
    return state | {f"{path}.{name}": getattr(module, name).detach() for path, module, name in _adapted(model)}


def merge(model: nn.Module) -> None:
    """Replace each adapted matrix by the changed one, in place: the model is as if it had never had adapters."""
    for _, module, name in list(_adapted(model)):
        parametrize.remove_parametrizations(module, name)


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Each adapted matrix: the path of its module, the module, its name there."""
    for path, module in model.named_modules():
        for name in getattr(module, "parametrizations", {}):
            yield path, module, name
