"""What trains and embeds can be imported with torch, numpy, safetensors, tiktoken and what comes with transformers."""

import subprocess
import sys

# Neither the cluster's libraries nor those that read and check files.
BLOCKED = ["ray", "pydantic", "typer", "rich", "pyarrow", "sklearn", "scipy", "pandas", "matplotlib", "threadpoolctl"]
MODULES = [
    "raybert.model.bert",
    "raybert.model.files",
    "raybert.model.interop",
    "raybert.model.losses",
    "raybert.data.reader",
    "raybert.data.tensors",
    "raybert.encode.vectors",
    "raybert.spectral.count",
    "raybert.spectral.factorise",
    "raybert.spectral.whiten",
    "raybert.tokenizer",
    "raybert.train.alone",
    "raybert.train.checkpoint",
    "raybert.train.feed",
    "raybert.model.optimizer",
    "raybert.model.schedule",
    "raybert.train.step",
    "tests.unit.test_packed",
    "benchmarks.gpu",
    "benchmarks.on_gpu.correct",
    "benchmarks.on_gpu.learn",
    "benchmarks.on_gpu.step",
]
PROGRAM = """
import importlib, sys
blocked, modules = (names.split(",") for names in sys.argv[1:])

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
for module in modules:
    importlib.import_module(module)
"""


def test_a_bare_machine_can_import_what_trains():
    subprocess.run([sys.executable, "-c", PROGRAM, ",".join(BLOCKED), ",".join(MODULES)], check=True)
