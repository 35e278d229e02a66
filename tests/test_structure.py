"""The house: imports go one way, rooms and files stay small, a name means one thing."""

import ast
import collections
import functools
import graphlib
import os
import subprocess
import sys

import pytest
from helpers import ROOT

# Imports go from a row to the rows above it; within a row or a package they may go anywhere but in circles.
ORDER = (
    ("utils",),
    ("distributed", "logger"),
    ("config_rules",),
    ("config", "checkpoint"),
    ("data",),
    ("models",),
    ("optimizer", "lr_scheduler", "analysis"),
    ("training",),
    ("detection",),
    ("main", "detect", "hubconf", "tools"),
)
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}
# What may be imported inside functions: packages that need not be installed, our modules that are built on
# them, and what takes long to import and is not always used.
OPTIONAL = ("datasets", "onnxruntime", "openvino", "torchao", "triton", "wandb")
OPTIONAL += ("data.opencv", "models.fast.attention_kernels")
SLOW = ("matplotlib", "torch", "torch._dynamo", "torch._inductor")
# Names that classification and detection both have for the same step.
SHARED_NAMES = {"load"}


def files(pattern):
    """Files of the repository outside tests, without those of environments and outputs."""
    rooms = [name for name in (*LEVELS, "configs", "docs", "scripts") if (ROOT / name).is_dir()]
    return [
        *ROOT.glob(pattern),
        *(path for room in rooms for path in sorted(ROOT.glob(f"{room}/**/{pattern}"))),
    ]


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in files("*.py")
}


@functools.cache
def tree_of(name):
    return ast.parse(MODULES[name].read_text())


def imports(name):
    """(what a module imports, whether inside a function); of packages, the modules that they really load."""
    inside = {
        child
        for function in ast.walk(tree_of(name))
        if isinstance(function, (ast.FunctionDef, ast.Lambda))
        for child in ast.walk(function)
    }
    package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree_of(name)):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            found = [f"{base}.{alias.name}" for alias in node.names]
            found = [module if module in MODULES else base for module in found]
        for module in found:
            if name.startswith("tools.") and f"tools.{module}" in MODULES:
                module = f"tools.{module}"
            yield module, node in inside


def packages_of(module):
    """The packages around a module, and itself: what importing it runs."""
    parts = module.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts)) if ".".join(parts[: end + 1]) in MODULES]


def test_imports_go_one_way():
    graph = {}
    for name in MODULES:
        graph[name] = set()
        for module, _ in imports(name):
            for loaded in packages_of(module):
                here, there = LEVELS[name.split(".")[0]], LEVELS[loaded.split(".")[0]]
                assert there <= here, f"{name} imports {loaded}, which comes later"
                if not f"{name}.".startswith(f"{loaded}."):  # its own package has begun to load already
                    graph[name].add(loaded)
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the modules of a circle


def test_functions_import_what_is_optional_or_slow():
    for name in MODULES:
        for module, inside in imports(name):
            if inside:
                assert any(f"{module}.".startswith(f"{known}.") for known in OPTIONAL + SLOW), (name, module)


def test_option_rules_need_neither_models_nor_torch():
    assert {module for module, _ in imports("config_rules")}.isdisjoint({"torch", "models", "optimizer"})


def test_rooms_and_files_stay_small():
    assert len([path for path in MODULES.values() if path.parent == ROOT]) <= 10
    doors = {path.name for path in (ROOT / "models").iterdir()} - {"__init__.py", "__pycache__"}
    assert len(doors) <= 15, doors
    found = [path for pattern in ("*.py", "*.md", "*.html", "*.sh", "*.yaml") for path in files(pattern)]
    long = {str(path.relative_to(ROOT)) for path in found if len(path.read_text().splitlines()) > 650}
    assert long == set()


def test_two_public_functions_never_share_a_name():
    found = collections.defaultdict(set)
    for name in MODULES:
        if LEVELS[name.split(".")[0]] < LEVELS["main"]:
            for node in tree_of(name).body:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    found[node.name].add(name)
    shared = {function: modules for function, modules in found.items() if len(modules) > 1}
    assert shared.keys() <= SHARED_NAMES, shared


FIRST = """
import gc, importlib, inspect, os, py_compile, sys, traceback
# Other people's packages take seconds to import, and not one of them imports a module of ours.
import matplotlib.figure, pycocotools.mask, sklearn.datasets, timm.data, timm.models
import torch.utils.flop_counter, torch.utils.tensorboard, torchvision.transforms.v2
modules = dict(line.split("=") for line in sys.argv[2:])
assert modules.keys().isdisjoint(sys.modules)
sys.dont_write_bytecode, sys.pycache_prefix = False, sys.argv[1]
for path in modules.values():  # once, and not in every child
    py_compile.compile(path)
inspect.getmodule(sys._getframe())  # torch asks for it where an operator is registered: so it is remembered
gc.disable()
gc.freeze()
loaded = set()
for name in modules:
    if name in loaded:  # by its package, which is imported before it in any case
        continue
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        with open(read) as file:
            loaded.update(other for other in file.read().split() if other.startswith(name + "."))
        if os.wait()[1]:
            print(name, "cannot be imported first")
        continue
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # an optional package
        code = error.name.split(".")[0] in {module.split(".")[0] for module in modules}
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        os.write(write, " ".join(modules.keys() & sys.modules.keys()).encode())
        code = 0
    sys.stderr.flush()
    os._exit(code)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_module_can_be_the_first_import(tmp_path):
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tools'}")
    modules = [f"{name}={path}" for name, path in MODULES.items()]
    command = [sys.executable, "-c", FIRST, str(tmp_path), *modules]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
