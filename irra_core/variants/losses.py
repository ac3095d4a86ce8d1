"""The registry of all losses: name → function.

A loss named in a recipe is looked up in LOSSES; recipes.LOSS_NAMES lists the same names without importing torch.
"""

from collections.abc import Callable

from torch import Tensor

from irra_core.losses import id_loss, itc_loss, mlm_loss, sdm_loss
from irra_core.variants.cmpm import cmpc_loss, cmpm_loss
from irra_core.variants.ibm import ibm_loss
from irra_core.variants.tal import tal_loss, tse_loss
from irra_core.variants.tbps import nitc_loss, ritc_loss

LOSSES: dict[str, Callable[..., Tensor]] = {
    "sdm": sdm_loss,
    "itc": itc_loss,
    "cmpm": cmpm_loss,
    "cmpc": cmpc_loss,
    "tal": tal_loss,
    "ibm": ibm_loss,
    "nitc": nitc_loss,
    "ritc": ritc_loss,
    "tse": tse_loss,
    "id": id_loss,
    "mlm": mlm_loss,
}
