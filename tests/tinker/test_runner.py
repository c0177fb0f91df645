"""`import tinker` is loops_tinker where the runner says so, under each name that scripts import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loops_tinker.__main__ import main
from loops_tinker.old_names import modules

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = """
import pickle, sys
import loops_tinker
import tinker, tinker.types
from tinker import ServiceClient, types
from tinker.lib.public_interfaces import APIFuture
from tinker.lib.public_interfaces.rest_client import RestClient
from tinker.lib.public_interfaces.service_client import ServiceClient as Service
from tinker.lib.retry_handler import RetryConfig
from tinker.types import LossFnType
from tinker.types.optim_step_request import AdamParams
from tinker.types.optimizer import OptimParams
from tinker.types.tensor_data import TensorData
from tinker.types.sample_response import SampleResponse
assert Service is ServiceClient is tinker.lib.public_interfaces.ServiceClient is loops_tinker.ServiceClient
assert TensorData is types.TensorData is tinker.TensorData
APIFuture[int], RetryConfig(progress_timeout=3)
assert pickle.loads(pickle.dumps(tinker.AdamParams())) == tinker.AdamParams()
print(*sys.argv[1:])
"""


def python(*arguments: str, path: str = str(ROOT), cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True)


def test_a_script_imports_what_it_knows(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(IMPORTS)
    for arguments in (["run", str(script)], ["run", "-m", "script"]):
        done = python("-m", "loops_tinker", *arguments, "--its", "own", cwd=tmp_path)
        assert (done.stdout, done.stderr) == ("--its own\n", "")
    folder = python("-m", "loops_tinker", "path").stdout.strip()
    assert python(str(script), "x", path=f"{folder}:{ROOT}").stdout == "x\n"


def test_ours_wins_over_an_installed_one_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "tinker").mkdir()
    (tmp_path / "tinker" / "__init__.py").write_text("raise ImportError('the other one')")
    (tmp_path / "tinker-0.38.0.dist-info").mkdir()
    (tmp_path / "tinker-0.38.0.dist-info" / "METADATA").write_text("Name: tinker\nVersion: 0.38.0\n")
    done = python("-m", "loops_tinker", "run", "-c", "import tinker", path=f"{ROOT}:{tmp_path}")
    assert done.stderr == "`import tinker` is loops_tinker here, and not the installed tinker 0.38.0\n"


@pytest.mark.parametrize("arguments", [[], ["run"], ["other"]])
def test_usage(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["loops_tinker", *arguments])
    with pytest.raises(SystemExit, match=r"python -m loops_tinker run script\.py"):  # printed; the code is 1
        main()


def test_each_old_module_is_one_of_ours() -> None:
    for name, module in modules().items():
        assert name.startswith("tinker.")
        assert module.__name__.startswith(("loops_tinker.", "tinker.lib"))
