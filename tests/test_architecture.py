"""The folders import only what the architecture allows, and every package is listed for installation."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "filtering", "kernels", "model", "tokenizer")


def imports_in(source: str, package: str) -> Iterator[str]:
    """Absolute names of all modules a file imports, at any depth; `package` resolves the relative ones."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield module
            # `from .. import model` names the module only here.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of(folder: str) -> dict[Path, set[str]]:
    """For each file: top-level packages, and of this project `redwhale.FOLDER`."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        package = ".".join(("redwhale", *path.parent.relative_to(ROOT).parts))
        names = set()
        for name in imports_in(path.read_text(encoding="utf-8"), package):
            parts = name.split(".")
            if parts[0] != "redwhale":
                names.add(parts[0])
            elif len(parts) > 1:
                names.add(".".join(parts[:2]))
        found[path.relative_to(ROOT)] = names
    assert found, folder
    return found


def offences(folder: str, allowed) -> list[str]:
    return [
        f"{path} imports {name}" for path, names in imports_of(folder).items() for name in names if not allowed(name)
    ]


def test_the_parser_sees_every_way_of_importing():
    source = (
        "import torch.nn as nn\nfrom os import path\nfrom . import a\nfrom ..model import b\nfrom ...tokenizer.spm "
        "import c\nfrom .. import errors\ndef f():\n    import json, redwhale.engine.cli\n"
    )
    assert set(imports_in(source, "redwhale.engine.steps")) == {
        *("torch.nn", "os", "os.path", "redwhale.engine.steps", "redwhale.engine.steps.a", "redwhale.engine.model"),
        *("redwhale.engine.model.b", "redwhale.tokenizer.spm", "redwhale.tokenizer.spm.c", "redwhale.engine"),
        *("redwhale.engine.errors", "json", "redwhale.engine.cli"),
    }


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "engine"])
def test_nothing_imports_the_engine(folder):
    assert offences(folder, lambda name: name != "redwhale.engine") == []


def test_kernels_import_torch_and_triton_only():
    permitted = {"torch", "triton", "redwhale.kernels", *sys.stdlib_module_names}
    assert offences("kernels", lambda name: name in permitted) == []


@pytest.mark.parametrize("folder", ["filtering", "tokenizer"])
def test_filtering_and_tokenizer_import_neither_torch_nor_any_other_folder(folder):
    forbidden = {"torch", *(f"redwhale.{other}" for other in FOLDERS if other != folder)}
    assert offences(folder, lambda name: name not in forbidden) == []


def test_filtering_and_tokenizer_load_without_torch():
    code = "import redwhale.filtering, redwhale.tokenizer, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_model_imports_kernels_and_only_its_embedding_init_the_tokenizer():
    # flash_attn is used where it is installed.
    permitted = {"torch", "safetensors", "flash_attn", "redwhale.model", "redwhale.kernels", *sys.stdlib_module_names}
    found = offences("model", lambda name: name in permitted)
    assert [offence for offence in found if offence != "model/embedding_init.py imports redwhale.tokenizer"] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_package_imports_itself_relatively(folder):
    absolute = [
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*.py")
        if any(
            name.split(".")[0] in ("redwhale", *FOLDERS)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
        )
    ]
    assert absolute == []


def test_exactly_the_packages_are_listed_for_installation():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = [path.parent.relative_to(ROOT) for top in FOLDERS for path in (ROOT / top).rglob("__init__.py")]
    packages = {".".join(("redwhale", *folder.parts)): folder.as_posix() for folder in folders}
    assert sorted(setuptools["packages"]) == sorted(packages)
    assert setuptools["package-dir"] == packages


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_with_sources_is_a_package(folder):
    assert [
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    ] == []


def test_the_command_lines_help_does_not_wait_for_torch():
    program = "import sys; import redwhale.engine.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_every_public_name_of_the_engine_exists():
    import redwhale.engine

    for name in redwhale.engine.__all__:
        assert getattr(redwhale.engine, name) is not None
