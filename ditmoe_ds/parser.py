"""The parser of both command lines, whose help tells defaults."""

import argparse
from typing import Any


class Parser(argparse.ArgumentParser):
    """``--help`` gives the default of every option that has one and a text, unless that text gives it."""

    def __init__(self, **given: Any):
        super().__init__(**given, formatter_class=_Help)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing or "default:" in (action.help or "") else super()._get_help_string(action)
