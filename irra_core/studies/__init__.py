"""Grids of runs, their comparison, transfer between data sets and the page of results."""

from irra_core.settings import lazily

_HOMES = {
    "grid": (
        "ROUGH_STEP_SECONDS ROUGH_RUN_SECONDS LOOK_EVERY Study STUDIES plan plan_transfer plan_all estimate run_all "
        "study_folder save_study"
    ),
    "sizes": "SIZES sized domains",
    "committed": "DONE export_run disagreement machines committed",
    "pictures": "picture",
    "page": "write_markdown",
    "verdicts": "PRIMARY Hypothesis verdict_table more_runs with_more_seeds verdicts",
    "tables": "collect beside_published gains seconds_per_step",
}
__getattr__, __dir__, __all__ = lazily(__name__, _HOMES)
