"""The package's sources → Markdown pages of its public names, read by griffe: nothing of the package but its recipes
(standard library alone) is imported, so that the site needs no torch."""

import ast
import dataclasses
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {  # page → title, what it is about, and its names in the order of a user's day
    "recipes": ("Recipes", "Every number of a run, and where it comes from.", "recipe Recipe RECIPES PRESETS"),
    "notebook_parameters": (
        "Parameters and progress",
        "What the notebooks' second cells and their progress bars call.",
        "notebook_parameters progress",
    ),
    "data": (
        "Data",
        "A data set on disk becomes a table with one row per caption; captions and photos become tensors.",
        "load_annotations open_annotations check_annotations make_synthetic synthetic_ceiling tokenize load_images",
    ),
    "model": (
        "Model",
        "CLIP's two encoders, the interaction encoder, and weights from files, runs and hubs.",
        "build_model IRRA Features load_model push_to_hub save_checkpoint load_checkpoint load_official save_official",
    ),
    "losses": (
        "Losses",
        "Pure functions of features and identities. `total_loss` fills their arguments by name.",
        "sdm_loss itc_loss cmpm_loss cmpc_loss tal_loss id_loss mlm_loss LOSSES",
    ),
    "training": (
        "Training and evaluation",
        "A recipe and a table become a run folder; a model and a table become scores with intervals.",
        "train logged evaluate Evaluation retrieval_metrics published",
    ),
    "search": ("Search", "A sentence searches photos.", "Gallery kept_gallery QueryExplorer"),
}
CONSTANTS = {
    "RECIPES": "Data set → the fields in which its recipe differs from the paper's for CUHK-PEDES.",
    "PRESETS": "Preset → the fields that it sets.",
    "LOSSES": "Name in `recipe.losses` → function. Its arguments are filled by name.",
}


def write_api(folder: Path) -> dict[str, str]:
    """Write a page per section, a page per public module and `index.md`; every public name → its page."""
    package = _load()
    names, pages = homes(package), {}
    modules = {name: path for name, path in names.items() if find(package, path).is_module}
    for page, (title, about, listed) in SECTIONS.items():
        objects = {name: find(package, names[name]) for name in listed.split()}
        parts = [f"# {title}\n\n{about}", *(described(f"irra.{name}", each) for name, each in objects.items())]
        _write(folder / f"{page}.md", parts)
        pages |= dict.fromkeys(objects, page)
    public = {find(package, path).path: name for name, path in names.items() if name not in modules}
    for name, path in modules.items():
        _write(folder / f"module_{name}.md", _module(package, name, find(package, path), public))
        pages[name] = f"module_{name}"
    if left := set(names) - set(pages):
        raise SystemExit(f"docs/site/api.py: SECTIONS lacks the public names {', '.join(sorted(left))}")
    _write(folder / "index.md", _index(package, names, modules))
    return pages


def _load():
    import griffe

    return griffe.load("irra_core", search_paths=[ROOT], allow_inspection=False)


def homes(module) -> dict[str, str]:
    """The names that a package loads on first use → their paths below it; none for a module that has no `_HOMES`."""
    if "_HOMES" not in module.members:
        return {}
    table = ast.literal_eval(str(module["_HOMES"].value))
    given = {name: home for home, names in table.items() for name in names.split()}
    return {name: home if _is_module(module, home, name) else f"{home}.{name}" for name, home in given.items()}


def _is_module(package, home: str, name: str) -> bool:
    """Whether a name that is its module's last one means the module, as `settings.lazily` decides it."""
    return home.split(".")[-1] == name and name not in package[home].members


def find(package, path: str):
    """The object at a path, through the names that packages load on first use and through imports."""
    found = package
    for part in path.split("."):
        found = found.members[part] if part in found.members else find(found, homes(found)[part])
        found = found.final_target if found.is_alias else found
    return found


def described(name: str, each, depth: int = 0) -> str:
    """One object in Markdown: its signature, its docstring, its fields and its public methods."""
    if each.is_function and "property" in each.labels:
        return _directive("attribute", f"{name}: {each.returns}", markdown(_docstring(each)), depth)
    if each.is_function:
        kept = _parameters(each)
        returns = f" -> {each.returns}" if each.returns else ""
        options = "".join(f":{label}:\n" for label in ("classmethod", "staticmethod") if label in each.labels)
        kind = "method" if each.parent.is_class else "function"
        return _directive(kind, f"{name}({kept}){returns}", markdown(_docstring(each)), depth, options)
    if each.is_class:
        members = [member for member in each.members.values() if _is_public(member) and _docstring(member)]
        inner = [described(member.name, member, depth + 1) for member in members]
        body = "\n\n".join([markdown(_docstring(each)), _fields(each), *inner])
        made = None if "dataclass" in each.labels else each.members.get("__init__")
        signature = f"{name}({_parameters(made)})" if made is not None and made.is_function else name
        return _directive("class", signature, body, depth)
    return _directive("data", name, CONSTANTS.get(each.name) or markdown(_comment(each)), depth)


def _directive(kind: str, signature: str, body: str, depth: int, options: str = "") -> str:
    fence = "`" * (6 - depth)
    return f"{fence}{{py:{kind}}} {signature}\n{options}\n{body.strip()}\n{fence}"


def _parameters(function) -> str:
    """The arguments of a signature, without `self`, `cls` and those that begin with an underscore."""
    import griffe

    kept = [each for each in function.parameters if each.name not in ("self", "cls") and each.name[0] != "_"]
    written, star = [], False
    for each in kept:
        if each.kind is griffe.ParameterKind.keyword_only and not star:
            written.append("*")
        star = star or each.kind in (griffe.ParameterKind.var_positional, griffe.ParameterKind.keyword_only)
        mark = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(each.kind, "")
        default = each.default if each.default and not mark else None
        text = f"{mark}{each.name}" + (f": {each.annotation}" if each.annotation else "")
        written.append(text + (f" = {default}" if default else ""))
    return re.sub(r"\s+", " ", ", ".join(written))


def _fields(each) -> str:
    """The fields of a dataclass or named tuple as a table with their comments; of the recipe, with reasons."""
    if each.name == "Recipe":
        return _recipe_fields()
    rows = [
        (member.name, member.annotation, member.value, _comment(member))
        for member in each.members.values()
        if member.is_attribute and _is_public(member) and member.annotation and not _docstring(member)
    ]
    return _table(("field", "type", "default", "what it is"), rows)


def _recipe_fields() -> str:
    sys.path.insert(0, str(ROOT))
    from irra_core.recipes import Recipe

    rows = []
    for each in dataclasses.fields(Recipe):
        kind = each.type if isinstance(each.type, str) else getattr(each.type, "__name__", None)
        kind = kind if kind and "|" not in str(each.type) else str(each.type)
        accepted = ", ".join(map(str, each.metadata["choices"]))
        rows.append((each.name, kind, repr(each.default), each.metadata["why"], accepted))
    return _table(("field", "type", "default", "why", "accepted"), rows)


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table whose first three columns are code; nothing without rows."""
    if not rows:
        return ""

    def cell(column: int, value) -> str:
        text = "" if value is None else str(value)
        return (f"`{text}`" if text and column < 3 else escaped(text)).replace("|", "\\|")

    lines = [" | ".join(cell(column, value) for column, value in enumerate(row)) for row in rows]
    return "\n".join(f"| {line} |" for line in (" | ".join(head), " | ".join("---" for _ in head), *lines))


def _docstring(each) -> str:
    return each.docstring.value if each.docstring else ""


def _comment(each) -> str:
    """What the comment behind an object's first line says."""
    line = each.filepath.read_text(encoding="utf-8").splitlines()[each.lineno - 1]
    found = re.search(r"(?<=  # ).*", line)
    return found.group() if found else ""


def _is_public(member) -> bool:
    return not member.is_alias and not member.name.startswith("_")


def _module(package, name: str, module, public: dict[str, str]) -> list[str]:
    """The page of a module: its docstring and its public functions and classes."""
    parts = [f"# irra.{name}\n\n```{{py:module}} irra.{name}\n```\n\n{markdown(_docstring(module))}"]
    given = {each: find(package, f"{module.path.partition('.')[2]}.{each}") for each in homes(module)}
    given = given or {each.name: each for each in module.members.values() if _is_public(each)}
    shown = {each: found for each, found in given.items() if (found.is_function or found.is_class)}
    elsewhere = [f"{{py:obj}}`irra.{public[found.path]}`" for found in shown.values() if found.path in public]
    if elsewhere:
        parts.append(f"Described elsewhere: {', '.join(elsewhere)}.")
    own = {each: found for each, found in shown.items() if found.path not in public and _docstring(found)}
    return [*parts, *(described(f"irra.{name}.{each}", found) for each, found in own.items())]


def _index(package, names: dict[str, str], modules: dict[str, str]) -> list[str]:
    parts = [
        "# API reference\n\nEvery public name of `import irra_core as irra`, in the order of a user's day. Shapes are "
        'in the signatures: `Float[Tensor, "batch dim"]` is a tensor of floats with two axes, and the same name means '
        "the same size."
    ]
    for page, (title, _, listed) in SECTIONS.items():
        rows = [(f"{{py:obj}}`irra.{name}`", _summary(find(package, names[name]))) for name in listed.split()]
        parts.append(f"## [{title}]({page}.md)\n\n" + _links(rows))
    rows = [(f"[`irra.{name}`](module_{name}.md)", _summary(find(package, path))) for name, path in modules.items()]
    parts.append("## Modules\n\n" + _links(rows))
    tree = "\n".join([*SECTIONS, *(f"irra.{name} <module_{name}>" for name in modules)])
    return [*parts, f"```{{toctree}}\n:hidden:\n\n{tree}\n```"]


def _summary(each) -> str:
    """The first line of a docstring."""
    return CONSTANTS.get(each.name) or escaped(_docstring(each).partition("\n\n")[0].replace("\n", " "))


def _links(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| name | what it is |", "|---|---|", *(f"| {name} | {about} |" for name, about in rows)])


def _write(path: Path, parts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def escaped(text: str) -> str:
    """Text in which nothing but code between backticks has a meaning in Markdown."""
    parts = re.split(r"(`(?:[^`\n]|\n(?!\n))+`)", text)
    plain = [re.sub(r"[\\*_<>\[\](){}#|~$^]", r"\\\g<0>", part) for part in parts[::2]]
    plain = [re.sub(r"(?m)^(\s*)([+=]|\d+[.)])(?=\s)", r"\1\\\2", part) for part in plain]
    return "".join(part for pair in zip(plain, [*parts[1::2], ""]) for part in pair)


def markdown(docstring: str) -> str:
    """A docstring as Markdown: paragraphs, lists of lines that begin with a hyphen, and indented lines as code."""
    blocks, kind = [], None
    for line in docstring.splitlines():
        now = "code" if line.startswith("    ") or (kind == "code" and not line.strip()) else "text"
        if now != kind:
            blocks.append((now, []))
            kind = now
        blocks[-1][1].append(line)
    shown = []
    for now, lines in blocks:
        text = "\n".join(lines).rstrip()
        code = "\n".join(line[4:] for line in text.splitlines())
        shown.append(f"```text\n{code}\n```" if now == "code" else escaped(text))
    return "\n\n".join(part.strip("\n") for part in shown)
