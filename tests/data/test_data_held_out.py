"""What is held out of the Python library: by path, the same in every version; what is like it is left out."""

from kanlm.data import stdlib
from kanlm.data.corpus import _key_rule


def library(folder, files: dict[str, str]) -> stdlib.StandardLibrary:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return stdlib.standard_library(str(folder))


def text(name: str, lines: int = 30) -> str:
    return "".join(f"statement number {line} of the module {name}\n" for line in range(lines))


def test_another_version_holds_out_the_same_modules(tmp_path):
    """Modules change their text, and some become packages."""
    old = library(tmp_path / "old", {f"m{n}.py": text(f"m{n}") for n in range(200)})
    new = library(
        tmp_path / "new",
        {f"m{n}/__init__.py" if n % 3 else f"m{n}.py": text(f"m{n}", 40) for n in range(200)},
    )
    names = [
        {key for document, (key, *_) in one.keys().items() if _key_rule(split, 0.1, one.keys())(document)}
        for one, split in ((old, "validation"), (new, "validation"), (new, "train"))
    ]
    assert names[0] == names[1] and 5 < len(names[0]) < 40
    assert names[2] == {f"m{n}" for n in range(200)} - names[0]


def test_what_is_much_like_a_held_out_file_is_neither_trained_on_nor_scored(tmp_path):
    files = {f"m{n}.py": text(f"m{n}") for n in range(60)}
    files |= {f"copy_{n}.py": text(f"m{n}")[40:] + text(f"copy_{n}", 5) for n in range(60)}
    one = library(tmp_path, files)
    keys = one.keys()
    assert all(set(alike) == {f"copy_{key[1:]}"} for key, *alike in keys.values() if key[0] == "m")
    scored, trained = (
        {key for document, (key, *_) in keys.items() if _key_rule(split, 0.1, keys)(document)}
        for split in ("validation", "train")
    )
    number = {key: key.removeprefix("copy_").removeprefix("m") for key in scored | trained}
    assert scored and trained
    assert {number[key] for key in scored}.isdisjoint({number[key] for key in trained})


def test_the_python_version_is_said(tmp_path):
    import platform

    assert f"Python {platform.python_version()}" in str(library(tmp_path, {"a.py": text("a")}))
