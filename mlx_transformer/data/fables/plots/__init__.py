"""The plots, and the assembly of a story from one."""

from mlx_transformer.data.fables.plots import belongings, counting, friends, making, places  # noqa: F401 (register)
from mlx_transformer.data.fables.plots.frame import PLOTS, Plot, ending, opening
from mlx_transformer.data.fables.teller import Teller

__all__ = ["PLOTS", "Plot", "tell"]

_OPENERS = list(dict.fromkeys(plot.opener for plot in PLOTS.values()))
_LEADS = [
    [(lead, plot) for plot in PLOTS.values() if plot.opener == opener for lead in plot.leads] for opener in _OPENERS
]


def tell(t: Teller) -> None:
    """Generate or parse one story: the opening, a plot, and an ending that refers to the opening."""
    opening(t)
    t.paragraph()
    leads = _LEADS[t.say(*((len(leads), opener) for opener, leads in zip(_OPENERS, _LEADS, strict=True)))]
    plot = leads[t.say(*(lead for lead, _ in leads))][1]
    t.plot = plot.name
    plot.body(t)
    t.paragraph()
    ending(t)
