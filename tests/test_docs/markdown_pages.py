"""What the tests of the documentation read from its Markdown files."""

import re
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
DOCS = [
    ROOT / 'README.md',
    ROOT / 'CONTRIBUTING.md',
    ROOT / 'CHANGELOG.md',
    *sorted((ROOT / 'docs').glob('*.md')),
]
PAGES = DOCS + [
    *sorted((ROOT / 'configs').rglob('*.md')),
    *sorted((ROOT / 'tools').rglob('*.md')),
]
NAMES = {path: str(path.relative_to(ROOT)) for path in PAGES}

_parser = MarkdownIt('commonmark').enable('table')


def tokens(path: Path):
    """All tokens of a page, those inside of paragraphs included."""
    for token in _parser.parse(path.read_text(encoding='utf-8')):
        yield token
        yield from token.children or ()


def blocks(path: Path, *languages: str):
    """The code blocks in these languages, in order."""
    return [
        token.content
        for token in tokens(path)
        if token.type == 'fence' and token.info.strip() in languages
    ]


def anchors(path: Path):
    """The anchors of a page's headings, as GitHub makes them."""
    parsed = _parser.parse(path.read_text(encoding='utf-8'))
    for opening, heading in zip(parsed, parsed[1:]):
        if opening.type == 'heading_open':
            text = ''.join(t.content for t in heading.children)
            yield re.sub(r'[^\w\- ]', '', text.lower()).replace(' ', '-')
