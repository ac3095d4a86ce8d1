"""A data set's name, or the path of own data → its annotation file and the folders of its photos."""

from pathlib import Path

from irra_core.annotations import DATA_SETS
from irra_core.recipes import OWN_DATA, own_file
from irra_core.settings import data_root, project_root, unknown


def find(dataset: str, root: str | Path | None) -> tuple[Path, list[Path]]:
    """The annotation file, and the folders that its image paths may be relative to, in order of preference."""
    if dataset in DATA_SETS:
        source = DATA_SETS[dataset]
        folder = data_root(root) / source.folder
        for path in (folder, folder / source.file, folder / "imgs"):
            if not path.exists():
                raise missing(dataset, root, f"{path} is not there")
        return folder / source.file, [folder / "imgs"]
    file = own_file(dataset)
    if file is None and Path(dataset).suffix.lower() in OWN_DATA:
        looked = " and ".join(map(str, dict.fromkeys((Path.cwd(), project_root()))))  # one folder outside a checkout
        raise FileNotFoundError(
            f"annotation file {dataset!r} is not there: looked in {looked}. "
            "Give its path; `-p dataset synthetic` needs no file"
        )
    if file is None:
        error = f"{unknown('data set', dataset, DATA_SETS)}, or the path of an annotation file ({', '.join(OWN_DATA)})"
        raise ValueError(f"{error}, or of a folder with {', '.join(OWN_DATA[2:])} files in it, not in its subfolders")
    given = [] if root is None else [data_root(root)]
    home = file if file.is_dir() else file.parent
    return file, [folder for folder in (home / "imgs", home, *given) if folder.is_dir()]


def missing(dataset: str, root: str | Path | None, what: str) -> FileNotFoundError:
    """The error for a missing data set: `what` is missing, the expected folders, and how to get them."""
    source, folder = DATA_SETS[dataset], data_root(root)
    if source.paper is None:
        remedy = f'It needs no download: irra.open_annotations(irra.recipe("{dataset}"), "{folder}") renders it there.'
    else:
        remedy = (
            f"Request it from the authors of {source.paper}. If it is elsewhere, give the folder above it as "
            "data_root or in IRRA_DATA. `-p dataset synthetic` needs no data."
        )
    if (folder / source.folder / "caption_all.json").is_file():
        remedy = f"caption_all.json, which is there, has no split: {source.file} is needed, which has it. {remedy}"
    return FileNotFoundError(
        f"data set {dataset!r}: {what}. Expected is\n"
        f"    {folder}/\n        {source.folder}/\n            {source.file}\n            imgs/\n{remedy}"
    )
