import subprocess
import sys

import matplotlib
import pytest

from sdpo.errors import SDPOError
from sdpo.report import ReportPaths, write_report


def test_report_of_two_runs_is_written_to_the_first_folder_or_out(write_run, tmp_path):
    rows = {0: {"val-core/t/acc/mean@1": 0.0}, 2: {"val-core/t/acc/mean@1": 1.0}}
    first, second = write_run("first", rows), write_run("second", rows)
    backend = matplotlib.rcParams._get("backend")
    paths = write_report([first, second])
    assert paths == ReportPaths(first / "report.png", first / "report.html")
    assert matplotlib.rcParams._get("backend") == backend
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    html = paths.page.read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 2 and "first, second" in html
    elsewhere = write_report([str(first)], tmp_path / "new" / "folder")
    assert elsewhere.page.parent == elsewhere.plot.parent == tmp_path / "new" / "folder"
    assert elsewhere.plot.read_bytes().startswith(b"\x89PNG")


def test_user_errors_are_one_line(write_run, tmp_path):
    with pytest.raises(SDPOError, match="no run folder given"):
        write_report([])
    with pytest.raises(SDPOError, match="no such run folder"):
        write_report([tmp_path / "missing"])
    (tmp_path / "file").write_text("")
    with pytest.raises(SDPOError, match="cannot write the report: File exists; name another folder by --out"):
        write_report([write_run("a", {0: {}})], tmp_path / "file")


def test_import_of_the_package_loads_no_plotting_library():
    heavy = "{'torch', 'transformers', 'matplotlib', 'rich', 'numpy'}"
    code = f"import sys, sdpo.report, sdpo.observability.progress; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_plots_and_page_need_no_torch():
    code = "import sys, sdpo.report.plots, sdpo.report.page, sdpo.report.console; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
