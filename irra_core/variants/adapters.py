"""CLIP and a recipe → the same CLIP with fewer trainable parameters: frozen encoders or low-rank adapters.

peft does not fit: it adds its change in the forward pass of the module that it wraps, but this library reads matrices
directly (an attention's in_proj_weight in parts). With torch's parametrisation every read returns the changed matrix.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from irra_core.transformer import CLIP

MATRICES = (
    "attn.in_proj_weight",
    "attn.out_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
)  # in every block


class LowRank(nn.Module):
    """A matrix → that matrix plus up @ down, a change of at most rank `rank`; initially zero, since `up` is zero.

    Source: LoRA (Hu et al., ICLR 2022), section 4.1, with scale 1: only the learning rate sets the size of a step.
    """

    def __init__(self, matrix: Float[Tensor, "rows cols"], rank: int):
        super().__init__()
        rows, cols = matrix.shape
        self.down = nn.Parameter(matrix.new_empty(rank, cols).normal_(std=cols**-0.5))
        self.up = nn.Parameter(matrix.new_zeros(rows, rank))

    def forward(self, matrix: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        device = "cpu" if matrix.is_meta else matrix.device.type  # autocast does not support the device meta
        with torch.autocast(device, enabled=False):  # so that the merged matrix equals this one bit for bit
            return matrix + self.up @ self.down


def limit_learning(clip: CLIP, frozen: str, rank: int) -> None:
    """Freeze the encoders named by `frozen`; if `rank` is not 0, add adapters to the matrices of the others.

    In an encoder with adapters only the adapters are trained: its embeddings, biases, LayerNorms and projections are
    frozen. Autograd stores no activations of a frozen encoder. Adapters are initialised from torch's random state.
    Raises ValueError for a rank that is not below the smaller side of every matrix.
    """
    for name, parameter in clip.named_parameters():
        side = "image" if name.startswith("visual.") else "text"
        parameter.requires_grad_(not rank and frozen not in (side, "both"))
    if rank and frozen != "image":
        _add_adapters(clip.visual.transformer.resblocks, rank)
    if rank and frozen != "text":
        _add_adapters(clip.transformer.resblocks, rank)


def _add_adapters(blocks: nn.ModuleList, rank: int) -> None:
    """Add a low-rank change to each of the MATRICES of transformer blocks."""
    for block in blocks:
        for path in MATRICES:
            owner, _, name = path.rpartition(".")
            module = block.get_submodule(owner)
            matrix = getattr(module, name)
            if rank >= min(matrix.shape):
                raise ValueError(
                    f"adapter_rank {rank}: this backbone has matrices of {'×'.join(map(str, matrix.shape))}, which "
                    f"accept a rank below {min(matrix.shape)}; 4 to 64 are usual"
                )
            parametrize.register_parametrization(module, name, LowRank(matrix, rank))


def is_adapter(name: str) -> bool:
    """True for the name of a parameter of an adapted matrix: `up` and `down`, or the frozen `original`."""
    return ".parametrizations." in name


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the same model without adapters: each adapted matrix as the forward pass uses it."""
    state = {name: value for name, value in model.state_dict().items() if not is_adapter(name)}
    return state | {f"{path}.{name}": getattr(module, name).detach() for path, module, name in _adapted(model)}


def merge(model: nn.Module) -> None:
    """Replace each adapted matrix by its merged value, in place; afterwards the model has no adapters."""
    for _, module, name in list(_adapted(model)):
        parametrize.remove_parametrizations(module, name)


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields each adapted matrix: the path of its module, the module, and the matrix's name in the module."""
    for path, module in model.named_modules():
        for name in getattr(module, "parametrizations", {}):
            yield path, module, name
