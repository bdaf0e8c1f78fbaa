"""Links within the repository lead somewhere, and named files exist."""

import re
from urllib.parse import unquote

import pytest
from markdown_pages import DOCS, NAMES, PAGES, ROOT, anchors, tokens

EXTERNAL = ('https://', 'http://')
PATH = re.compile(
    r'(configs|docs|resources|tests|tools|wsbcn_mm|\.github)/[\w./+-]+'
)


@pytest.mark.parametrize('page', PAGES, ids=NAMES.get)
def test_links_lead_somewhere(page):
    for token in tokens(page):
        link = token.attrGet('href') or token.attrGet('src')
        if link is None or link.startswith(EXTERNAL):
            continue
        path, _, anchor = unquote(link).partition('#')
        target = (page.parent / path) if path else page
        assert target.exists(), f'{link}: there is no {target}'
        if anchor:
            assert target.suffix == '.md', f'{link}: not a page'
            assert anchor in anchors(target), f'{link}: no such heading'


@pytest.mark.parametrize('page', DOCS, ids=NAMES.get)
def test_named_files_exist(page):
    for token in tokens(page):
        if token.type == 'code_inline' and PATH.fullmatch(token.content):
            assert (ROOT / token.content).exists(), token.content


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 150


def test_every_page_is_in_the_table_of_contents():
    contents = (ROOT / 'docs/index.md').read_text().split()
    for page in (ROOT / 'docs').iterdir():
        if page.suffix in ('.md', '.rst', '.ipynb') and page.stem != 'index':
            assert page.stem in contents, page.name


def test_every_public_name_has_an_entry_in_the_api():
    import wsbcn_mm
    from wsbcn_mm import engine

    text = (ROOT / 'docs/api.rst').read_text()
    documented = set(re.findall(r'::.*\b(\w+)$', text, re.MULTILINE))
    public = {*wsbcn_mm.__all__, *engine.__all__} - {'__version__'}
    assert public <= documented
