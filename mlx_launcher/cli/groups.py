"""Commands that have commands of their own."""

import importlib
from collections.abc import Mapping
from typing import Any

import click


class Table(click.Group):
    """Shows its commands as `table` names and explains them, in that order, without importing any.

    `modules` says which of them are imported only when they are asked for; what is only there is not shown.
    """

    def __init__(
        self,
        *arguments: Any,
        table: Mapping[str, str],
        modules: Mapping[str, str] | None = None,
        **attributes: Any,
    ) -> None:
        super().__init__(*arguments, **attributes)
        self._table = table
        self._modules = modules or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._modules:
            return super().get_command(ctx, cmd_name)
        command = importlib.import_module(self._modules[cmd_name]).command
        assert isinstance(command, click.Command)  # noqa: S101
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self._table.items()))
