# SPDX-License-Identifier: Apache-2.0
"""The part of `doctor` that looks for the files of others that a scale starts from: data, autoencoders, networks of features, teachers."""

from collections.abc import Iterable, Iterator

from pipeline import paths
from pipeline.autoencoders import PretrainedVae
from pipeline.doctor import Check
from pipeline.files import sha256_file
from pipeline.params import PARAMS_FILE, Slot, load
from pipeline.spaces import SPACES
from scm_core.published import DATA_HOME, WEIGHTS, WEIGHTS_HOME, Home, PublishedFile, locate


def checks(quick: bool, scale: str | None) -> Iterator[Check]:
    """All of them: there, and the right bytes (`quick`: the right size)."""
    params = load(paths.root() / PARAMS_FILE, scale)
    slots = list(params.active.slots.values())
    yield from data(quick, slots)
    yield from autoencoders(quick, slots)
    yield from weights(quick, slots)
    yield from imported_teachers(quick, slots)


def data(quick: bool, slots: Iterable[Slot]) -> Iterator[Check]:
    """Data sets that do not come inside packages. ImageNet and images of one's own are only looked for: their job checks them."""
    wanted = {(slot.dataset.source, slot.dataset.path): slot.dataset for slot in slots}
    for source, path in wanted:
        if source == "cifar10":
            from scm_core.data.sources.cifar10 import ARCHIVE

            yield _published("data set cifar10", ARCHIVE, DATA_HOME, quick)
        elif source in ("imagenet", "images"):
            folder = DATA_HOME.folder / "imagenet" if source == "imagenet" else wanted[source, path].wanted().path
            there = folder is not None and (folder.is_file() or (folder.is_dir() and any(folder.iterdir())))
            remedy = (
                f"put ILSVRC2012's training images there in one of the forms of docs/data.md, "
                f"or name the folder above it in {DATA_HOME.variable}"
                if source == "imagenet"
                else "put the images there, or correct dataset.path in params.yaml"
            )
            yield Check(f"data set {source}", there, f"{folder}{'' if there else ' is not there'}", remedy)


def autoencoders(quick: bool, slots: Iterable[Slot]) -> Iterator[Check]:
    """Published autoencoders, by name or in a folder."""
    names = {slot.vae.pretrained: slot.vae.sha256 for slot in slots if isinstance(slot.vae, PretrainedVae)}
    for name, digest in names.items():
        from scm_core.autoencoder_kl import KNOWN, WEIGHTS

        if name in KNOWN:
            yield _published(f"autoencoder {name}", KNOWN[name].weights, WEIGHTS_HOME, quick)
            continue
        file = paths.root() / name / WEIGHTS
        there = file.is_file()
        right = there and (quick or sha256_file(file) == digest)
        detail = f"{file}{'' if right else ': another digest' if there else ' is not there'}"
        yield Check(f"autoencoder {name}", right, detail, "give the right folder, or its sha256, in params.yaml")


def weights(quick: bool, slots: Iterable[Slot]) -> Iterator[Check]:
    """The published networks of the feature spaces."""
    for space in dict.fromkeys(space for slot in slots for space in slot.evaluation.spaces):
        known = WEIGHTS.get(SPACES[space].extractor)
        if known is not None:
            yield _published(f"weights of {space}", known, WEIGHTS_HOME, quick)


def _published(what: str, known: PublishedFile, home: Home, quick: bool) -> Check:
    path = home.folder / known.file
    source = f"{known.urls[0]} ({known.size / 1e6:.0f} MB, SHA-256 {known.sha256})"
    if not path.is_file():
        remedy = (
            f"put {known.file} there, from {source}; or name the folder that has it in {home.variable}; where there is "
            "internet the first job that needs it fetches it"
        )
        return Check(what, False, f"{path} is not there", remedy)
    size = path.stat().st_size
    right = size == known.size and (quick or sha256_file(path) == known.sha256)
    wrong = "damaged or another file" if size == known.size else f"{size} bytes, {known.size} expected"
    return Check(
        what, right, f"{path}{'' if right else f': {wrong}'}", f"remove it and put the one from {source} there"
    )


def imported_teachers(quick: bool, slots: Iterable[Slot]) -> Iterator[Check]:
    """The files that teachers of a scale are imported from: there, and the right bytes (`quick`: there)."""
    for slot in slots:
        for size in slot.sizes.values():
            if size.imported is None:
                continue
            what = f"teacher {size.imported.file}"
            try:
                path = locate(size.imported.file, paths.root())
            except FileNotFoundError as error:
                yield Check(what, False, "not there", str(error))
                continue
            if path.is_dir():  # of diffusers: the stage finds the weights in it
                yield Check(what, True, str(path))
                continue
            right = quick or sha256_file(path) == size.imported.sha256
            yield Check(
                what, right, f"{path}{'' if right else ': another digest'}", "give the right file, or its sha256"
            )
