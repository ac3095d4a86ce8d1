"""`irra report`: every finished run and study → one page."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none: IRRA_REPORTS names the folder."""


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print its path."""
    from irra_core.studies.report import write_report

    print(write_report())
    return 0
