"""The house rules: imports point one way, names resolve lazily, the core stays small, the wheel is whole."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import minidiffedit

ROOT = Path(minidiffedit.__file__).parent
RANK = {
    "ddim": 0, "tokenizer": 0, "images": 0, "refusals": 0, "metadata": 0, "metrics": 0, "attention": 1, "diffedit": 1,
    "steer": 1, "perceptual": 1, "preview": 0, "state": 7, "regions": 7, "report": 8,
    "kernels.attention": -1, "kernels.__init__": 0, "kernels": 0,
    "unet": 2, "clip": 2, "vae": 2, "configs": 3, "fast": 3, "hub": 4, "checkpoint": 4, "sd": 5, "editor": 6,
    "verify": 7,
    "methods.sdedit": 7, "arms": 8, "methods.__init__": 8, "commands.__init__": 9, "commands.common": 9,
    "bench": 8, "commands.bench": 10,
    "datasets": 1, "evaluate": 9, "commands.evaluate": 10,
    "commands.editing": 10, "commands.redraw": 10, "commands.models": 10, "commands.report": 11,
    "batch": 8, "ray_batch": 9, "commands.batch": 10,
    "page": 0, "watch": 2, "sheet": 8, "figures": 9, "commands.figures": 11,
    "cli": 12, "__main__": 13, "__init__": 13,
}  # fmt: skip
EXTRAS = {"matplotlib", "ray", "torchmetrics", "torchvision"}
SPINE = "diffedit ddim sd unet attention vae clip tokenizer checkpoint".split()  # noqa: SIM905 (a sentence)


def modules():
    """Every module, those of a folder as folder.name."""
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): ast.parse(p.read_text()) for p in ROOT.rglob("*.py")}


def imported(tree):
    """(module, at run time) for every import; those under TYPE_CHECKING are not at run time."""
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                yield "." * node.level + name, id(node) not in typing_only
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, True


def test_imports_point_one_way():
    for name, tree in modules().items():
        assert name in RANK, f"{name}.py has no rank"
        for module, at_run_time in imported(tree):
            if module.startswith(".") and at_run_time and name != "__init__":
                above = name.split(".")[: -(len(module) - len(module.lstrip(".")))]  # the folder the dots lead to
                target = ".".join([*above, module.lstrip(".")])
                # A folder counts as all that is in it.
                ranks = [rank for known, rank in RANK.items() if f"{known}.".startswith(f"{target}.")]
                assert target == "__version__" or max(ranks) < RANK[name], f"{name} imports {target}"


def test_the_page_knows_nothing_but_the_noise_table():
    relative = {module for module, at_run_time in imported(modules()["diffedit"]) if module.startswith(".")}
    assert relative == {".ddim"}


def test_only_the_six_packages_are_imported():
    """Packages of extras only inside the functions that use them; Triton only in kernels/."""
    allowed = {"torch", "safetensors", "tokenizers", "numpy", "PIL", "huggingface_hub", *sys.stdlib_module_names}
    for name, tree in modules().items():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        extras = {"triton"} if name.startswith("kernels.") else EXTRAS
        for node in ast.walk(tree):
            for module, _ in imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
                top = module.split(".")[0]
                known = allowed | extras if id(node) in inside or "triton" in extras else allowed
                assert module.startswith(".") or top in known, f"{name} imports {module}"


def test_the_core_stays_within_its_budget():
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in SPINE}
    assert sum(lines.values()) <= 1500, lines


def test_readme_counts_its_lines_right():
    readme = (ROOT.parent / "README.md").read_text()
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in SPINE}
    for name, count in lines.items():
        assert f"| [`{name}.py`](minidiffedit/{name}.py) | {count} |" in readme, f"{name}.py has {count} lines"
    assert f"| together | {sum(lines.values()):,} |" in readme


def test_public_names_resolve_and_are_seen_by_type_checkers():
    assert set(minidiffedit.__all__) <= set(dir(minidiffedit))
    for name in minidiffedit.__all__:
        assert getattr(minidiffedit, name).__doc__ or name in ("Eps", "Track"), name
    typed = {
        a.name for n in ast.walk(modules()["__init__"]) if isinstance(n, ast.ImportFrom) and n.level for a in n.names
    }
    assert typed == set(minidiffedit.__all__)
    with pytest.raises(AttributeError):
        minidiffedit.nothing  # noqa: B018


def test_importing_the_package_imports_no_torch():
    code = "import sys, minidiffedit, minidiffedit.cli; print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.slow
def test_the_wheel_works_outside_the_clone(tmp_path):
    project = ROOT.parent
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", str(project), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    code = (
        "import minidiffedit, pathlib; assert 'site' in pathlib.Path(minidiffedit.__file__).parts; "
        "print(minidiffedit.Tokenizer()(['a horse'])[0, :4].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.strip() == "[49406, 320, 4558, 49407]", done.stderr
    metadata = next((tmp_path / "site").glob("*.dist-info"))
    licences = {path.name for path in metadata.rglob("LICENSE*")}
    assert licences == {"LICENSE", "LICENSE.clip"}
    wanted = [line for line in (metadata / "METADATA").read_text().splitlines() if line.startswith("Requires-Dist")]
    assert len([line for line in wanted if "extra ==" not in line]) == 6
