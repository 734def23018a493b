"""From what a user calls a model to a directory."""

import shutil
from pathlib import Path

import pytest
from support.modeldirs import model_directory

from mlx_launcher.errors import LaunchError
from mlx_launcher.models.places import hub_cache, installed
from mlx_launcher.models.resolve import find, is_hub_name

MAIN, OTHER = "a" * 40, "b" * 40
LLAMA = {"model_type": "llama"}


class Machine:
    """A home directory, a current directory, and the models in both."""

    def __init__(self, root: Path) -> None:
        self.home, self.cwd = root / "home", root / "cwd"
        self.home.mkdir()
        self.cwd.mkdir()
        self.environment = {"HOME": str(self.home)}
        self.notes: list[str] = []

    def find(self, name: str) -> Path | None:
        return find(name, str(self.cwd), self.environment, self.notes.append)

    def refused(self, name: str) -> LaunchError:
        with pytest.raises(LaunchError) as caught:
            self.find(name)
        assert "\n" not in caught.value.message
        assert caught.value.hint
        return caught.value

    def in_hub(self, name: str, commit: str = MAIN, ref: str | None = "main") -> Path:
        folder = hub_cache(self.environment) / f"models--{name.replace('/', '--')}"
        if ref:
            (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (folder / "refs" / ref).write_text(commit)
        return model_directory(folder / "snapshots" / commit, LLAMA)

    def in_lmstudio(self, name: str, folder: str = ".lmstudio/models") -> Path:
        return model_directory(self.home / folder / name, LLAMA)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    "name", ["org/name", "mlx-community/Qwen3-4B-4bit", "a/b@main", "a/b@refs/pr/1", f"a/b@{MAIN}"]
)
def test_names_of_the_hub(name: str) -> None:
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "name", "/a/b", "./a/b", "../b", "~/b", "a/b/c", "a//b", "a/b@", "a/b@x y", "a/..", "a--b/c", "a/b\n", "ä/b"],
)
def test_what_is_no_name_of_the_hub(name: str) -> None:
    assert not is_hub_name(name)


def test_a_name_too_long_for_the_hub() -> None:
    assert is_hub_name("a/" + "b" * 96)
    assert not is_hub_name("a/" + "b" * 97)


def test_a_directory_in_all_its_spellings(machine: Machine) -> None:
    here = model_directory(machine.cwd / "here", LLAMA)
    assert machine.find(str(here)) == here
    assert machine.find("here") == here
    assert machine.find("./x/../here/") == here
    there = model_directory(machine.home / "-odd 'name' ü", LLAMA)
    assert machine.find("~/-odd 'name' ü") == there


def test_a_directory_wins_over_the_same_name_elsewhere(machine: Machine) -> None:
    machine.in_hub("org/name")
    here = model_directory(machine.cwd / "org" / "name", LLAMA)
    assert machine.find("org/name") == here


def test_a_broken_directory_is_found_and_judged_by_others(machine: Machine) -> None:
    (machine.cwd / "empty").mkdir()
    assert machine.find("empty") == machine.cwd / "empty"


def test_the_hubs_cache(machine: Machine) -> None:
    main = machine.in_hub("org/name")
    other = machine.in_hub("org/name", OTHER, "v2")
    assert machine.find("org/name") == main
    assert machine.find("org/name@v2") == other
    assert machine.find(f"org/name@{OTHER}") == other
    assert machine.find("org/name@v3") is None
    assert machine.find("org/else") is None
    assert machine.notes == []


def test_a_snapshot_that_is_not_whole_is_told_and_not_found(machine: Machine) -> None:
    (machine.in_hub("org/name") / "model.safetensors").unlink()
    assert machine.find("org/name") is None
    (note,) = machine.notes
    assert "not whole" in note
    assert "model*.safetensors" in note


def test_a_whole_copy_elsewhere_serves_where_the_cache_has_half_of_one(machine: Machine) -> None:
    (machine.in_hub("org/name") / "tokenizer.json").unlink()
    older = machine.in_lmstudio("org/name", ".cache/lm-studio/models")
    assert machine.find("org/name") == older
    newer = machine.in_lmstudio("org/name")
    assert machine.find("org/name") == newer
    assert machine.find("org/name@main") is None  # LM Studio knows no revisions


@pytest.mark.parametrize("content", ["", "nonsense", "../../../etc", "\udcff"])
def test_a_torn_ref_is_no_ref(machine: Machine, content: str) -> None:
    machine.in_hub("org/name")
    ref = hub_cache(machine.environment) / "models--org--name" / "refs" / "main"
    ref.write_bytes(content.encode(errors="surrogateescape"))
    assert machine.find("org/name") is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "/h/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "/f"}, "/f/hub"),
        ({"HF_HOME": "~/f"}, "/h/f/hub"),
        ({"HF_HOME": "/f", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "$D/new", "D": "/d"}, "/d/new"),
        ({"HF_HUB_CACHE": ""}, "/h/.cache/huggingface/hub"),
    ],
)
def test_where_the_hubs_cache_is(variables: dict[str, str], expected: str) -> None:
    assert hub_cache({"HOME": "/h", **variables}) == Path(expected)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name(machine: Machine, name: str) -> None:
    assert machine.refused(name).code == "no_model"


def test_lm_studios_placeholder_is_explained(machine: Machine) -> None:
    error = machine.refused("current-model")
    assert error.code == "no_model"
    assert "LM Studio" in error.message
    assert "nothing to start" in error.message
    # A directory of that name has to be written as one.
    here = model_directory(machine.cwd / "current-model", LLAMA)
    assert machine.find("./current-model") == here


@pytest.mark.parametrize("name", ["nowhere", "/no/where", "./a/b", "~nobody-at-all/x", "x" * 5000, "a\0b"])
def test_what_is_not_there(machine: Machine, name: str) -> None:
    assert machine.refused(name).code == "model_not_found"


@pytest.mark.parametrize(
    ("file", "words"),
    [("m.gguf", "llama.cpp"), ("m.GGUF", "llama.cpp"), ("model.safetensors", "is a file"), ("x", "is a file")],
)
def test_a_file(machine: Machine, file: str, words: str) -> None:
    (machine.cwd / file).touch()
    error = machine.refused(file)
    assert error.code == "model_unsupported"
    assert words in error.message


def test_a_dangling_link(machine: Machine) -> None:
    (machine.cwd / "link").symlink_to(machine.cwd / "gone")
    assert "link" in machine.refused("link").message


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["m-Q4_K_M.gguf"], "llama.cpp's format"),
        (["config.json", "pytorch_model.bin"], "PyTorch"),
        (["config.json", "consolidated.00.pth"], "PyTorch"),
        (["adapter_config.json", "adapters.safetensors"], "an adapter"),
        (["adapter_config.json", "adapter_model.bin"], "an adapter"),
    ],
)
def test_a_directory_of_another_format(machine: Machine, files: list[str], words: str) -> None:
    for place in (machine.cwd / "there", machine.home / ".lmstudio" / "models" / "org" / "there"):
        place.mkdir(parents=True)
        for file in files:
            (place / file).touch()
    for name in ("there", "org/there"):
        error = machine.refused(name)
        assert error.code == "model_unsupported"
        assert words in error.message


def test_other_files_beside_mlx_weights_do_no_harm(machine: Machine) -> None:
    path = model_directory(machine.cwd / "m", LLAMA)
    (path / "training_args.bin").touch()
    assert machine.find("m") == path


def test_all_that_is_installed(machine: Machine) -> None:
    machine.in_hub("org/zz--odd")
    machine.in_hub("org/pinned", OTHER, ref=None)
    machine.in_lmstudio("Org/studio")
    cache = hub_cache(machine.environment)
    (cache / "datasets--org--d").mkdir()
    (cache / "models--alone").mkdir()
    (cache / ".locks").mkdir()
    places = installed(machine.environment)
    assert [(place.name, place.source) for place in places] == [
        (f"org/pinned@{OTHER}", "hub"),
        ("Org/studio", "lmstudio"),
        ("org/zz--odd", "hub"),
    ]
    assert machine.find(f"org/pinned@{OTHER}") == places[0].path
    shutil.rmtree(machine.home)
    assert installed(machine.environment) == []
