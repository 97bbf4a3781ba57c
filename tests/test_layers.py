"""Imports point one way, and each foreign package has one door."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CNQ = ROOT / "cnq"

# A module imports only from those before it.
ORDER = [
    "errors", "machine", "files", "tuning", "gguf_file", "fingerprint", "imatrix_file", "hessian_file", "imatrix_stats",
    "logits_file", "prompts", "records", "catalog", "archs", "vocab", "checkpoint", "adapters", "convert", "convert_lora",
    "to_hf", "inspection", "engine", "quantize", "corpus", "texts", "named_texts", "hessian", "imatrix", "scores",
    "evaluate", "paired", "allocate", "choices", "speed", "trials", "bench", "doctor", "report", "context", "prompt_cache",
    "chat", "params", "sessions", "chat_terminal", "answer", "slots", "serve", "web", "ollama", "steps", "fitting", "build",
    "terminal", "doctor_text", "options", "quantize_command", "run_commands", "cli", "__main__",
]  # fmt: skip
DOORS = {"llama_cpp": ["engine"], "torch": ["checkpoint", "adapters"], "sentencepiece": ["vocab"],
         "huggingface_hub": ["catalog"], "matplotlib": ["report"], "ollama": ["ollama"], "httpx": ["ollama"],
         "jinja2": ["prompts"], "prompt_toolkit": ["chat_terminal"], "numba": ["engine"]}  # fmt: skip


def module_of(path: Path) -> str:
    return path.relative_to(CNQ).parts[0].removesuffix(".py")


def imports(path: Path):
    """(imported module, whether at the top of the file, whether for types only) for every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = path.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module] if node.module else [f"{module}.{alias.name}" for alias in node.names]
        typing = isinstance(node.parent, ast.If) and "TYPE_CHECKING" in ast.dump(node.parent.test) if names else False
        for name in names:
            yield name, isinstance(node.parent, ast.Module), typing


def test_every_module_has_its_place():
    found = {module_of(p) for p in CNQ.rglob("*.py")} - {"__init__"}
    assert found == set(ORDER)


def test_a_file_imports_only_from_above_it():
    wrong = []
    for path in CNQ.rglob("*.py"):
        here = module_of(path)
        for name, _, typing in imports(path):
            parts = name.split(".")
            ours = parts[0] == "cnq" and len(parts) > 1 and parts[1] in ORDER and parts[1] != here and not typing
            if ours and (here == "__init__" or ORDER.index(parts[1]) >= ORDER.index(here)):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_each_foreign_package_has_one_door():
    wrong = []
    for path in CNQ.rglob("*.py"):
        for name, _, _ in imports(path):
            package = name.split(".")[0]
            if package in DOORS and module_of(path) not in DOORS[package]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_torch_is_never_imported_at_the_top_of_a_file():
    assert not [path for path in CNQ.rglob("*.py") for name, top, _ in imports(path) if name.split(".")[0] == "torch" and top]


def test_help_loads_nothing_heavy():
    """`cnq --help` has to answer at once."""
    code = "import sys, cnq.cli; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "gguf", "llama_cpp", "torch", "rich", "huggingface_hub", "prompt_toolkit", "jinja2", "httpx"} & set(
        loaded
    )
