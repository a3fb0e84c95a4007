"""Who imports whom: no circle, nothing of the core knows what stands around it, and `import undula` loads the core."""

import ast
import subprocess
import sys
from pathlib import Path

import undula

SOURCES = Path(undula.__file__).parent
AROUND = ("train", "study", "cli", "bundled", "integrations", "__main__")  # what uses the core


def imports(tree):
    """The import statements that run when a module is loaded."""
    for node in tree.body if hasattr(tree, "body") else ():
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.Try) or (isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test)):
            yield from imports(node)


def name(path):
    parts = path.relative_to(SOURCES.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph():
    """{module: the modules of undula whose loading its own asks for}; that of a package stands for what it exports."""
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


def test_the_core_knows_nothing_of_what_stands_around_it():
    """`undula` itself, which gives names to all of them, excepted."""
    wrong = {
        (module, asked)
        for module, every in graph().items()
        for asked in every
        if module != "undula"
        and module.split(".")[1] not in AROUND
        and (asked == "undula" or asked.split(".")[1] in AROUND)
    }
    assert wrong == set()


def test_the_edge_is_not_imported_by_what_it_stands_on():
    """Studies and bundled assets stand at the edge: training does not know studies, and only what runs a command or
    fetches an asset when it is asked to knows the others."""
    found = graph()
    assert {m for m, asked in found.items() if any(a.startswith("undula.study") for a in asked)} <= {
        m for m in found if m == "undula" or m.startswith(("undula.study", "undula.cli"))
    }
    assert not any(a.startswith("undula.study.") for a in found["undula"])
    assert {m for m, asked in found.items() if any(a.startswith("undula.cli") for a in asked)} <= {
        m for m in found if m.startswith(("undula.cli", "undula.__main__"))
    }


CODE = """
import sys
import torch
before = set(sys.modules)
import undula
loaded = set(sys.modules) - before
print(*sorted(m for m in loaded if m.count(".") > 1 and m.split(".")[1] in sys.argv[1:]))
print(*sorted({m.partition(".")[0] for m in loaded} - set(sys.stdlib_module_names) - {"undula"}))
"""


def test_importing_undula_loads_torch_and_the_core_alone():
    """Of what stands around it the declarations of a training alone: of studies and other libraries only the verb that
    loads them when it is called."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *(set(AROUND) - {"train"})],
        capture_output=True,
        text=True,
        check=True,
        cwd=SOURCES.parent,
    )
    around, others = done.stdout.splitlines()
    assert around == ""
    assert others == ""
