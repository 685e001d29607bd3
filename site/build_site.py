"""Build the website, without a network connection.

    python site/build_site.py            # writes build/site; open build/site/index.html

The pages come from the files of this repository: `sources.py` copies those that people read, and writes a page for each
method and each module of the library; Sphinx renders them as `conf.py` says. A warning is an error.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import build_main

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for `benchmarks`, which is not installed

import conf  # noqa: E402
from atlas_pages import write_script  # noqa: E402
from sources import REPOSITORY, write_sources, write_translated_sources  # noqa: E402

from lora_from_scratch.support.translation import ENGLISH, LANGUAGES, translate  # noqa: E402

PROMPTS = ("nb_code_prompt_show", "nb_code_prompt_hide")  # settings of conf.py that are text
SPHINX = {"zh": "zh_CN"}  # how Sphinx calls the languages


def build(output: Path, sources: Path) -> int:
    """Write the site into `output`, in each language; return Sphinx's exit status, which is 0 if all is well."""
    for folder in (output, sources):
        shutil.rmtree(folder, ignore_errors=True)
    write_sources(sources)
    status = render(sources, output)
    write_script(output / "_static")
    for language in set(LANGUAGES) - {ENGLISH}:
        own = sources.with_name(f"{sources.name}-{language}")
        shutil.rmtree(own, ignore_errors=True)
        write_translated_sources(own, language)
        prompts = {name: translate(getattr(conf, name), language) for name in PROMPTS}
        prompts["html_title"] = translate(f"# {conf.html_title}", language).removeprefix("# ")
        settings = [f"{name}={text}" for name, text in {"language": SPHINX[language], **prompts}.items()]
        status = status or render(own, output / language, *settings)
        name_stemmer(output / language / "_static" / "language_data.js")
    return status


def name_stemmer(script: Path) -> None:
    """Name the stemmer that the search page has: for Chinese, Sphinx 9.0 includes the English one and names another."""
    text = script.read_text(encoding="utf-8") if script.is_file() else ""
    if "ChineseStemmer" in text and "ChineseStemmer=" not in text:
        script.write_text(text.replace("ChineseStemmer", "EnglishStemmer"), encoding="utf-8")


def render(sources: Path, output: Path, *settings: str) -> int:
    """Let Sphinx write the pages, with settings that override those of `conf.py`; return its exit status."""
    doctrees = sources.with_name(f"{sources.name}-doctrees")
    shutil.rmtree(doctrees, ignore_errors=True)
    options = ["-b", "html", "-c", HERE, "-d", doctrees, "--fail-on-warning", "--keep-going", "--quiet"]
    overrides = [part for setting in settings for part in ("-D", setting)]
    return build_main([str(option) for option in (*options, *overrides, sources, output)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the website.")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build" / "site", help="default: build/site")
    output = parser.parse_args().output.resolve()
    status = build(output, output.with_name(f"{output.name}-sources"))
    print(f"the site could not be built (exit status {status})" if status else f"open {output / 'index.html'}")
    sys.exit(status)
