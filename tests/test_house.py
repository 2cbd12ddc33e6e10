"""The house rules by folder: who may import whom, how long a room may be, what nobody may know, what a wheel holds."""

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import minidiffedit
from minidiffedit.methods.table import SYSTEMS

ROOT = Path(minidiffedit.__file__).parent
SPINE = "diffedit ddim sd unet attention vae clip tokenizer checkpoint".split()  # noqa: SIM905 (a sentence)
EXTRAS = {"gradio", "matplotlib", "openvino", "ray", "starlette", "torchmetrics", "torchvision"}
PACKAGES = {"torch", "safetensors", "tokenizers", "numpy", "PIL", "huggingface_hub"}

# Room: what its files may import of the package, besides one another.
CORE = {f"{name}" for name in SPINE}
RUNNING = CORE | {"options", "path", "plans", "job", "result", "run", "cost", "files", "methods.table"}
ROOMS = {
    "core": {
        "clip_image",
        "kernels",
        "fast",
        "files.addons",
        "files.configs",
        "files.unsupported",
        "files.hub",
        "learnable",
        "prompts",
    },
    "clip_image": {"attention", "clip", "tokenizer"},
    "learnable": {"clip", "tokenizer", "unet"},
    "prompts": {"attention", "clip", "tokenizer"},
    "kernels": set(),
    "fast": {"attention", "kernels", "unet", "vae"},
    "options": {"ddim"},
    "path": {"ddim"},
    "methods": {*CORE, "options", "path"},
    "files": {*CORE, "clip_image", "__version__"},
    "plans": {"ddim", "methods.table", "options", "prompts"},
    "result": {"ddim", "files", "plans"},
    "job": {"ddim", "diffedit", "files", "options", "path", "plans", "prompts", "result"},
    "run": {"ddim", "diffedit", "files", "job", "kernels.alone", "plans", "progress", "result"},
    "cost": {*CORE, "files", "methods.table", "plans", "result", "run", "fast"},
    "progress": {"cost"},
    "views": {*RUNNING, "__version__", "many.metrics"},
    "many": RUNNING | {"fast", "kernels"},
    "page": {*RUNNING, "views", "__version__"},
    "commands": None,  # anything
    "cli": {"commands", "__version__"},
    "__main__": {"cli"},
    "__init__": None,
}
OWN = {"files.states": {"plans", "result", "path"}, "files.metadata": {"plans"}}  # beyond their room: a Result's
FOR_METHODS = {
    "torch",
    "numpy",
    "math",
    "collections",
    "dataclasses",
    "typing",
    "warnings",
    "functools",
    "itertools",
    "re",
}


@cache
def modules():
    """Every module, those of a folder as folder.name."""
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): ast.parse(p.read_text()) for p in ROOT.rglob("*.py")}


def text_of(name):
    return (ROOT / f"{name.replace('.', '/')}.py").read_text()


def lines_of(name):
    return len(text_of(name).splitlines())


def room_of(name):
    return "core" if name in SPINE else name.partition(".")[0]


def imported(tree):
    """(module, at run time, inside a function) for every import; those under TYPE_CHECKING are not at run time."""
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    within = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parts = [node.module] if node.module and not package(node) else [
                f"{node.module}.{alias.name}" if node.module else alias.name for alias in node.names
            ]  # fmt: skip
            for part in parts:
                yield "." * node.level + part, id(node) not in typing_only, id(node) in within
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, True, id(node) in within


def package(node):
    """Whether an import names a folder of ours, and so brings its modules."""
    return node.level and node.module and (ROOT / node.module.replace(".", "/")).is_dir()


def ours(name, tree):
    """(module of ours, inside a function) for every import at run time, by its full name."""
    for module, at_run_time, within in imported(tree):
        dots = len(module) - len(module.lstrip("."))
        if dots and at_run_time:
            above = name.split(".")[:-dots]
            yield ".".join([*above, module.lstrip(".")]), within


def test_imports_point_one_way():
    for name, tree in modules().items():
        room = room_of(name)
        assert room in ROOMS, f"{name}.py stands in no room"
        allowed = ROOMS[room]
        for target, _ in ours(name, tree) if allowed is not None else ():
            own = room_of(target) == room
            known = allowed | OWN.get(name, set())
            assert own or target in known or target.partition(".")[0] in known, f"{name} imports {target}"


def test_nothing_goes_round_in_circles():
    """Imports at the top of a file; within functions they may come late."""
    trees = modules()
    graph = {}
    for name, tree in trees.items():
        top = {target for target, within in ours(name, tree) if not within}
        graph[name] = {
            other
            for target in top
            for other in trees
            if other in (target, target.rpartition(".")[0], f"{target}.__init__")
        }
    while leaves := [name for name, targets in graph.items() if not targets - {name}]:
        graph = {name: targets - {*leaves} for name, targets in graph.items() if name not in leaves}
    assert not graph, f"these import one another: {graph}"


def test_the_page_knows_nothing_but_the_noise_table():
    assert {target for target, _ in ours("diffedit", modules()["diffedit"])} == {"ddim"}


def test_methods_know_no_file_no_clock_and_no_command():
    for name, tree in modules().items():
        if room_of(name) == "methods":
            tops = {module.split(".")[0] for module, _, _ in imported(tree) if not module.startswith(".")}
            assert tops <= FOR_METHODS, f"{name} imports {tops - FOR_METHODS}"
            calls = {
                node.func.id
                for node in ast.walk(tree)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            }
            assert not calls & {"open", "print", "input", "exec", "eval", "__import__"}, name


def test_only_the_six_packages_are_imported():
    """Packages of extras only inside the functions that use them; Triton only in kernels/."""
    for name, tree in modules().items():
        for module, _, within in imported(tree):
            top = module.split(".")[0]
            extra = (top == "triton" and room_of(name) == "kernels") or (top in EXTRAS and within)
            known = module.startswith(".") or top in PACKAGES or top in sys.stdlib_module_names
            assert known or extra, f"{name} imports {module}"


# ---------------------------------------------------------------- the shell knows no method

SHELL = ("commands", "many", "page", "views", "files")
DEFAULTS = {"diffedit", "text-to-image"}  # what `edit` and `generate` do unless told otherwise


def shell_nodes():
    """(module, node) of the shell, without what draws DiffEdit's own figures."""
    for name, tree in modules().items():
        if room_of(name) in SHELL and name != "views.figures":
            figures = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and "figure" in node.name]
            skipped = {id(node) for function in figures for node in ast.walk(function)}
            yield from ((name, node) for node in ast.walk(tree) if id(node) not in skipped)


def test_the_shell_names_no_method():
    for name, node in shell_nodes():
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in SYSTEMS.keys() - DEFAULTS, f"{name}:{node.lineno} names {node.value}"


def test_the_shell_asks_for_no_method():
    """No branch on a method's name: what is special is asked of the Plan or the Result."""
    for name, node in shell_nodes():
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asked = any(getattr(side, "attr", getattr(side, "id", "")) in ("method", "system") for side in sides)
            told = any(
                isinstance(one, ast.Constant) and one.value in SYSTEMS for side in sides for one in ast.walk(side)
            )
            assert not (asked and told), f"{name}:{node.lineno}"


def test_the_shell_imports_no_method():
    for name, tree in modules().items():
        if room_of(name) in (*SHELL, "plans", "job", "result", "run", "cost", "cli"):
            for target, _ in ours(name, tree):
                assert not target.startswith("methods") or target.startswith("methods.table"), (
                    f"{name} imports {target}"
                )


# ---------------------------------------------------------------- how long a room may be


def test_the_core_stays_within_its_budget():
    lines = {name: lines_of(name) for name in SPINE}
    assert sum(lines.values()) <= 1650, lines


def test_what_is_neither_core_nor_method_stays_within_its_budget():
    """5,200 lines were the aim, at 7,900 when words, crops, add-ons, weighted texts and states of every method were
    still to come. 11,046 is where it stood with them, 1,305 more are the page of `minidiffedit ui` (page/, ui.py of
    commands/): it may only become less. clip_image.py is a network too.
    """
    others = ("core", "clip_image", "methods", "kernels", "data")
    lines = {name: lines_of(name) for name in modules() if room_of(name) not in others}
    assert sum(lines.values()) <= 12252, (sum(lines.values()), sorted(lines.items(), key=lambda item: -item[1]))


def test_a_method_is_one_short_file():
    for name in modules():
        if room_of(name) == "methods" and name != "methods.table":
            assert lines_of(name) <= 150, f"{name} has {lines_of(name)} lines"


def functions():
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield name, node


def test_functions_are_short():
    """Without their docstring."""
    for name, node in functions():
        first = node.body[0]
        said = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
        assert node.end_lineno - node.lineno + 1 - said <= 60, f"{name}.{node.name}"


DOORS = (("run", "edit"), ("sd", "load"), ("diffedit", "find_mask"))


def test_functions_take_few_arguments():
    """But for the doors; a method's options are declared, not passed on; a kernel takes pointers and strides."""
    for name, node in functions():
        if room_of(name) != "kernels" and (name, node.name) not in DOORS:
            own, options = [*node.args.posonlyargs, *node.args.args], node.args.kwonlyargs
            counted = own if room_of(name) == "methods" else [*own, *options]
            assert len(counted) <= 12, f"{name}.{node.name} takes {len(counted)}"


def test_calls_fit_on_their_lines():
    marked = {name: text_of(name).count("# fmt: skip") for name in modules()}
    assert sum(marked.values()) < 15, {name: count for name, count in marked.items() if count}


def test_readme_is_a_page():
    assert len((ROOT.parent / "README.md").read_text().splitlines()) <= 140


def test_links_lead_somewhere():
    top = ROOT.parent
    pages = [top / "README.md", *top.glob("[a-z]*/README.md"), *ROOT.glob("*/README.md"), *top.glob(".github/*.md")]
    assert len(pages) >= 7
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), (page, link)


def test_the_locked_packages_are_those_that_are_pinned():
    locked = dict(
        line.split("==") for line in (ROOT.parent / "tests/locked.txt").read_text().splitlines() if line[0] != "#"
    )
    wanted = re.findall(r'^ +"([\w-]+)(==|>=)([\d.]+)[^<\n]*$', (ROOT.parent / "pyproject.toml").read_text(), re.M)
    assert len(wanted) > 15 and "pytest" in {name for name, _, _ in wanted}
    for name, sign, version in wanted:
        if name != "setuptools":
            had = locked[name.replace("_", "-")]
            assert had == version if sign == "==" else [*map(int, had.split("."))] >= [*map(int, version.split("."))], (
                name
            )


# ---------------------------------------------------------------- names and the wheel


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


def outside(folder, *words, site):
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    command = [sys.executable, "-P", *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def edits_with_its_own_miniature(folder):
    """A plain installation has a model to run, and a picture to try it on."""
    site, few = folder / "site", ["--steps", "4", "--maps", "2", "--seed", "0", "--target", "a zebra"]
    scene = site / "minidiffedit" / "mini" / "scenes" / "horse-zebra" / "source.png"
    done = outside(folder, "-m", "minidiffedit", "edit", scene, *few, "--model", "mini", site=site)
    assert done.returncode == 0 and (folder / "source-edited.png").exists(), done.stderr
    assert sum(path.stat().st_size for path in site.rglob("mini/**/*") if path.is_file()) < 60e6


def sees_types(folder, site):
    """mypy, of a file outside the clone: the names are typed, a wrong one is an error."""
    (folder / "use.py").write_text(
        "import minidiffedit\nreveal_type(minidiffedit.edit)\nreveal_type(minidiffedit.StableDiffusion.load)\n"
        "minidiffedit.eddit\n"
    )
    environment = {**os.environ, "PYTHONPATH": "", "MYPYPATH": str(site)}
    command = [sys.executable, "-P", "-m", "mypy", "--config-file=", "--follow-imports=silent", "use.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert "-> minidiffedit.result.Result" in done.stdout and 'has no attribute "eddit"' in done.stdout, done.stdout
    assert "import-untyped" not in done.stdout and "import-not-found" not in done.stdout


@pytest.mark.slow
def test_an_editable_installation_is_a_plain_path(tmp_path):
    """What `make` writes: mypy and IDEs read a .pth, not the finder that setuptools has otherwise."""
    project = tmp_path / "clone"
    shutil.copytree(
        ROOT.parent, project, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "judge", "*.egg-info")
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    install = ["install", "--editable", project, "--no-deps", "--no-build-isolation", "--target", tmp_path / "site"]
    subprocess.run([*pip, *install], check=True, cwd=tmp_path)
    lines = [line for path in (tmp_path / "site").glob("*.pth") for line in path.read_text().splitlines()]
    assert lines == [str(project)] and not [*(tmp_path / "site").glob("*finder*")]


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
        "print(minidiffedit.Tokenizer()(['a horse'])[0, :4].tolist()); "
        "from minidiffedit.methods.table import SYSTEMS; from minidiffedit.plans import blank_plan; "
        "from minidiffedit.cost import rows_at_defaults; print(rows_at_defaults('diffedit')); "
        "[blank_plan(name) for name, system in SYSTEMS.items() if system.edit]; "
        "from minidiffedit.views import report, sheet, figures; from minidiffedit.many import batch, evaluate"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.split("\n")[:2] == ["[49406, 320, 4558, 49407]", "140"], done.stderr
    edits_with_its_own_miniature(tmp_path)
    sees_types(tmp_path, tmp_path / "site")
    there = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site" / "minidiffedit").rglob("*.*")}
    here = {f"minidiffedit/{path.relative_to(ROOT)}" for path in ROOT.rglob("*.*") if "__pycache__" not in path.parts}
    assert {path for path in here if not path.endswith(".md")} <= there
    metadata = next((tmp_path / "site").glob("*.dist-info"))
    licences = {path.name for path in metadata.rglob("LICENSE*")}
    assert licences == {"LICENSE", "LICENSE.clip"}
    wanted = [line for line in (metadata / "METADATA").read_text().splitlines() if line.startswith("Requires-Dist")]
    assert len([line for line in wanted if "extra ==" not in line]) == 6
