"""The guides: every block of every page runs, in the order of the page, as it is printed."""

import logging
import pathlib
import re
import warnings

import pytest

import quantal
from quantal import _custom

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = [DOCS / "quantization_model_loading.md", *sorted((DOCS / "guide").glob("*.md"))]
PAGES += [DOCS / "python.md", DOCS / "70b.md"]


def blocks(page: pathlib.Path) -> list[tuple[int, str]]:
    """(line, code) of the Python blocks."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start()) + 1, m[1]) for m in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of_the_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_custom, "_classes", {})
    monkeypatch.setattr(logging.getLogger("quantal"), "level", logging.WARNING)
    namespace: dict = {"__name__": "guide"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for line, code in blocks(page):
            exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_the_table_of_70b_is_the_planner_s():
    page = DOCS / "70b.md"
    namespace: dict = {"__name__": "guide"}
    for _, code in blocks(page):
        exec(code, namespace)
    rows = re.findall(
        r"^\| (.+?) \| .+? \| ([\d.]+) \| ([\d.]+) \| (yes|no) \| (\d+) \|$",
        page.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(rows) == 15
    for setting, *figures in rows:
        change = eval(f"dict({setting.strip('`')})", namespace) if "`" in setting else {}
        plan = quantal.plan(namespace["llama_70b"], "cuda", **{**namespace["run"], **change})
        found = [f"{plan.rank_bytes / 1e9:.1f}", f"{plan.peak_bytes / 1e9:.1f}"]
        found += ["yes" if plan.fits else "no", str(plan.largest_batch)]
        assert figures == found, setting


def headings(page: pathlib.Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"^#{1,4} (.+)$", text, re.MULTILINE)


def test_the_guide_has_every_heading_of_the_document():
    wanted = headings(DOCS / "api.md")[1:]
    found = [heading for page in (DOCS / "guide").glob("*.md") for heading in headings(page)]
    assert [h for h in wanted if h not in found] == []


def test_the_index_names_every_page():
    index = (DOCS / "guide" / "README.md").read_text(encoding="utf-8")
    for page in (DOCS / "guide").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_every_page_has_code():
    assert [p.name for p in PAGES if p.name != "README.md" and not blocks(p)] == ["future.md"]


def test_the_matrix_of_the_guide_is_the_generated_one():
    page = (DOCS / "guide" / "compatibility.md").read_text(encoding="utf-8")
    assert quantal.compatibility_matrix_markdown().strip() in page


def test_layouts_of_the_loading_guide_are_those_of_the_library():
    page = (DOCS / "quantization_model_loading.md").read_text(encoding="utf-8")
    section = page.split("## What each adapter writes")[1].split("\n## ")[0]
    for dialect in ("bnb", "hqq", "mlx", "quanto", "gguf", "dense"):
        for layout in quantal.file_layouts(dialect):
            assert f"`{layout}`" in section, (dialect, layout)
