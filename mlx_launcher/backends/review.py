"""Everything that is wrong with a configuration: the file itself, and what it names on this machine."""

from collections.abc import Mapping

from mlx_launcher.backends.models import require_model
from mlx_launcher.backends.textgen import prompt_files
from mlx_launcher.backends.which import BUILT_IN, which
from mlx_launcher.config.check import check_all
from mlx_launcher.config.document import Document
from mlx_launcher.config.layers import Flags, Settings, settle
from mlx_launcher.config.problems import Problem, error, warning
from mlx_launcher.errors import EXIT_CONFIG, LaunchError


def review(flags: Flags, environment: Mapping[str, str], document: Document, cwd: str) -> list[Problem]:
    """All problems of the file; where it has no errors, also what the chosen backend lacks on this machine.

    Downloads nothing and starts nothing.
    """
    problems = check_all(document)
    if any(problem.severity == "error" for problem in problems) and not flags.mode:
        return problems
    try:
        settings = settle(flags, environment, document)
        kind = which(settings, cwd)
        problems += _missing_prompts(settings)
        require_model(settings, cwd, environment, anything=kind.name not in BUILT_IN)
    except LaunchError as failure:
        # A backend that needs no server, or a model that is not here yet, is nothing that is wrong with the file.
        severe = failure.exit_code == EXIT_CONFIG
        message = failure.message.removeprefix(str(document.file)).lstrip(": ")
        found = (error if severe else warning)((), message, failure.hint)
        if not any(problem.message in failure.message for problem in problems):
            problems.append(found)
    return problems


def _missing_prompts(settings: Settings) -> list[Problem]:
    """Only warnings: a server passes them over."""
    place = ("backends", settings.block, "warmup", "promptFiles")
    return [
        warning((*place, str(number)), f"there is no file {file}", "Capture a request there, or take it out")
        for number, file in enumerate(prompt_files(settings))
        if not file.is_file()
    ]
