"""`report`: writes the report of a run again, or a page that compares several runs."""

from pathlib import Path

from common.atomic import write_file
from tools.runs.options import ReportOptions
from training.report.page import comparison_page, run_page
from training.report.run_files import read_run
from training.report.sample_pictures import PictureCache


def run(options: ReportOptions) -> int:
    """Write the page; return the exit code."""
    runs = [read_run(Path(folder)) for folder in options.folders]
    path = options.path
    cache = PictureCache()
    if len(runs) == 1:
        page = run_page(runs[0], cache, path.parent)
    else:
        page = comparison_page(runs, cache, path.parent)
    write_file(path, page)
    print(f"wrote {path}")
    return 0
