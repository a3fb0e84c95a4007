"""Who imports whom: no circle, nothing of the core knows what stands around it, and `import undula` loads the core."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import undula

SOURCES = Path(undula.__file__).parent
# what `import undula` does not load
AROUND = ("federated", "generate", "study", "serve", "jobs", "retrieve", "cli", "bundled", "integrations", "__main__")


def imports(tree):
    """All import statements: those within functions and for types too."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def name(path):
    parts = path.relative_to(SOURCES.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def graph():
    """{module: the modules of undula that it imports}; that of a package stands for what it exports."""
    files = {name(path): path for path in SOURCES.rglob("*.py")}
    found = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found[module] = set()
        for node in imports(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                asked = [(alias.name, None) for alias in node.names]
            else:
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                start = ".".join([*base, *([node.module] if node.module else [])])
                asked = [(start, alias.name) for alias in node.names]
            for start, what in asked:
                full = f"{start}.{what}"
                found[module] |= {m for m in (full if full in files else start,) if m in files and m != module}
    return found


def test_no_module_imports_itself_by_way_of_others():
    left = graph()
    while left:
        free = {module for module, asked in left.items() if not asked & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {module: asked for module, asked in left.items() if module not in free}


LEVELS = (  # a folder imports what stands before it: of its own level nothing, but for the first
    ("core", "kernels"),  # the ladder's plain forwards are kernels, kernels see layers
    ("starts",),
    ("methods",),
    ("host",),
    ("io", "observe", "optim"),
    ("combine", "compress", "ranks"),
    ("bundled", "integrations", "penalties"),
    ("train",),
    ("jobs", "retrieve"),
    ("federated", "generate", "serve", "study"),
    ("undula",),  # which gives names to all of them
    ("cli",),
    ("__main__",),
)


def folder(module):
    return module.split(".")[1] if "." in module else module


def test_a_folder_imports_what_stands_before_it():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    folders = {(folder(m), folder(a)) for m, asked in graph().items() for a in asked}
    assert {f for pair in folders for f in pair} == set(level)
    assert {(m, a) for m, a in folders if m != a and level[a] >= level[m] and {m, a} != set(LEVELS[0])} == set()


def test_the_top_imports_no_part_of_what_it_loads_when_it_is_called():
    assert not [a for a in graph()["undula"] if a.startswith(("undula.study.", "undula.integrations."))]


CODE = """
import sys
import torch
before, threads = set(sys.modules), torch.get_num_threads()
import undula
assert torch.get_num_threads() == threads  # verbs set it, the library does not
loaded = set(sys.modules) - before
print(*sorted(m for m in loaded if m.count(".") > 1 and m.split(".")[1] in sys.argv[1:]))
print(len(loaded))
print(*sorted({m.partition(".")[0] for m in loaded} - set(sys.stdlib_module_names) - {"undula"}))
"""


def test_importing_undula_loads_torch_and_the_core_alone():
    """Of what stands around it the declarations of a training alone: of studies and other libraries only the verb that
    loads them when it is called (PEFT alone costs five seconds and 340 MiB).  The number is there to notice a package
    that comes in by mistake; files that are split for their readers cost about a millisecond each."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *AROUND],
        capture_output=True,
        text=True,
        check=True,
        cwd=SOURCES.parent,
    )
    around, number, others = done.stdout.splitlines()
    assert around == ""
    assert int(number) <= 280
    assert others == ""
