"""The start page: its first block prints what the page shows, and it links to every page of the navigation."""

import re

import readme

PAGE = (readme.ROOT / "docs" / "index.md").read_text()


def test_the_first_block_prints_what_the_page_shows(capsys):
    code, shown = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", PAGE, re.DOTALL).groups()
    exec(compile(code, "docs/index.md, five minutes", "exec"), {})
    assert capsys.readouterr().out == shown


def test_the_start_page_links_to_every_page_of_the_navigation():
    nav = (readme.ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    pages = set(re.findall(r"[\w/]+\.md", nav)) - {"index.md"}
    assert sorted(page for page in pages if "/" not in page and f"({page})" not in PAGE) == []
