"""What the site of the documentation needs beyond MkDocs: links that leave docs/, mathematics, docstrings as they are.

On the forge the pages of docs/ link to the repository's other files by relative paths. The site has docs/ alone: there
a picture from elsewhere is copied in, and any other file becomes a link to the forge, under `repo_url` of mkdocs.yml.
Who names a file, a page or a heading that is not there, in docs/ or in Python, gets a warning; with --strict an error.
"""

import importlib.resources
import logging
import posixpath
import re
from pathlib import Path

from griffe import Extension, Object
from jinja2 import Environment
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PICTURES = {".png", ".jpg", ".svg"}
PYTHON = {
    path.relative_to(ROOT).as_posix()
    for folder in ("opendet_jax", "configs", "tests", "benchmarks", "experiments")
    for path in (ROOT / folder).rglob("*.py")
}
PAGE = re.compile(r"\bdocs/(\w+\.md)(?:#([\w-]+))?")

MATHJAX = "mathjax.js"
# Of a page only what arithmatex has marked is read as TeX. Without the menu nothing is loaded later.
MATHJAX_SETTINGS = r"""<script>
MathJax = {
  tex: {inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]]},
  options: {ignoreHtmlClass: ".*", processHtmlClass: "arithmatex", enableMenu: false},
}
</script>"""

log = logging.getLogger("mkdocs.hooks.docs")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MathJax comes from the package django-static-mathjax, which needs no Django."""
    mathjax = importlib.resources.files("mathjax") / "static/mathjax/es5/tex-svg-full.js"
    files.append(File.generated(config, MATHJAX, abs_src_path=str(mathjax)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links out of docs/ that lead somewhere."""
    here = posixpath.dirname(page.file.src_uri)

    def mended(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join("docs", here, link["path"]))
        if target.startswith("docs/") or not (ROOT / target).exists():
            return link[0]  # MkDocs has a warning for what is not there
        if posixpath.splitext(target)[1] not in PICTURES:
            return f"]({_on_the_forge(target, config)}{link['anchor'] or ''})"
        if files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
        return f"]({posixpath.relpath(target, here or '.')})"

    return re.sub(r"\]\((?P<path>(?:\.\./)+[^)#\s]+)(?P<anchor>#[^)\s]*)?\)", mended, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with names of Python files as links, and with MathJax where it has formulas."""

    def linked(code: re.Match) -> str:
        if code["link"]:
            return code[0]
        name = code["name"]
        found = [path for path in (name, f"opendet_jax/{name}") if path in PYTHON]
        found = found or sorted(path for path in PYTHON if path.endswith(f"/{name}"))
        if not found:
            log.warning("%s names %s, which is not in the repository", page.file.src_uri, name)
            return code[0]
        return f'<a href="{_on_the_forge(found[0], config)}">{code[0]}</a>'

    content = re.sub(r"(?P<link><a [^>]*>)?<code>(?P<name>[\w/]+\.py)</code>", linked, content)
    if 'class="arithmatex"' not in content:
        return content
    source = posixpath.relpath(MATHJAX, posixpath.dirname(page.url) or ".")
    return f'{content}\n{MATHJAX_SETTINGS}\n<script src="{source}" defer></script>'


def on_env(env: Environment, config: MkDocsConfig, files: Files) -> None:
    """Pages and headings that Python files name are there, as MkDocs checks for what pages name."""
    for path in sorted(PYTHON):
        for name, anchor in PAGE.findall((ROOT / path).read_text(encoding="utf-8")):
            file = files.get_file_from_path(name)
            if file is None or file.page is None or (anchor and anchor not in (file.page.present_anchor_ids or ())):
                log.warning("%s names docs/%s, which is not there", path, f"{name}#{anchor}".rstrip("#"))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Without this mark the theme does not ask GitHub how many stars the repository has, on every visit."""
    return output.replace(' data-md-component="source"', "")


def on_post_template(output: str, template_name: str, config: MkDocsConfig) -> str:
    """The same for 404.html."""
    return output.replace(' data-md-component="source"', "")


class Docstrings(Extension):
    """Docstrings as they are: they have no HTML in them, and the pages of docs/ that they name are links."""

    def on_object(self, *, obj: Object, **_):
        """Changes what stands outside code."""
        if obj.docstring:
            parts = re.split(r"(`[^`]*`)", obj.docstring.value)
            parts[::2] = (_with_links(part.replace("<", "&lt;")) for part in parts[::2])
            obj.docstring.value = "".join(parts)


def _with_links(text: str) -> str:
    return PAGE.sub(lambda page: f"[{page[0]}](../{page[0].removeprefix('docs/')})", text)  # seen from docs/api/


def _on_the_forge(path: str, config: MkDocsConfig) -> str:
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{config.repo_url}/{kind}/main/{path}"
