"""What all conditions share, made once: corpora, tokenizers, initial checkpoints, shards and held-out texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import msgspec
import torch

from redwhale.engine import MixedSequences, PackedSequences, TokenShards, pack_texts
from redwhale.engine.init_choice import Choice, FitTexts, choose_rows
from redwhale.engine.init_vocabulary import HybridVocabulary
from redwhale.engine.run_folder import write_json
from redwhale.filtering import FilterConfig, filter_corpus, read_documents
from redwhale.filtering.diversity import Topics, distinct_ngrams
from redwhale.model import NewVocabulary, generate_batch, load_model, save_model, write_extended
from redwhale.tokenizer import Tokenizer, TokenizerConfig, load_model_proto, merge_pieces
from redwhale.tokenizer.hybrid import corpus_words, select, trained_candidates

PROSE = ("bills", "court", "general", "reviews")
"""Sources of the held-out text."""


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """How large a reproduction is."""

    name: str
    source_megabytes: float
    """Raw text of each source, from its beginning."""
    added: tuple[int, ...]
    """Numbers of Korean pieces, ascending."""
    trained_pieces: int
    """Pieces that the tokenizer's training yields, to choose from."""
    usual_added: int
    """Pieces of every experiment but the vocabulary's."""
    tokens: int
    """Of a training run."""
    sweep_tokens: int
    """Of a run that looks for a learning rate."""
    seeds: tuple[int, ...] = (0, 1, 2)
    sequence_length: int = 256
    batch_size: int = 4
    """Sequences in a step."""
    heldout_bytes: int = 8_000
    """Of each Korean domain; twice as many of English."""
    stories: int = 12
    """Texts sampled from the base."""


FULL = Sizes(
    name="full", source_megabytes=3, added=(4_000, 8_000, 12_000, 20_000, 40_000), trained_pieces=60_000,
    usual_added=8_000, tokens=49_152, sweep_tokens=32_768,
)  # fmt: skip
QUICK = Sizes(
    name="quick", source_megabytes=1, added=(4_000, 8_000, 12_000), trained_pieces=20_000, usual_added=8_000,
    tokens=8_192, sweep_tokens=0, heldout_bytes=2_000, stories=4,
)  # fmt: skip


class Prepared:
    """The work folder of a reproduction. Everything in it is made on first use and found again afterwards.

    Args:
        root: the folder.
        data: folder with `models/stories15m`, `korean/{raw,heldout}` and `english`.
        sizes: how large.
    """

    def __init__(self, root: Path, data: Path, sizes: Sizes) -> None:
        self.root, self.data, self.sizes = root / sizes.name, data, sizes
        self.root.mkdir(parents=True, exist_ok=True)
        self.checkpoint = data / "models" / "stories15m"

    @property
    def base(self) -> Path:
        """The base in bf16, its embedding copied as head: as in the paper's base, the two are matrices of their own."""
        folder = self.root / "base"
        if not (folder / "config.json").exists():
            model = load_model(self.checkpoint, dtype=torch.bfloat16)
            if model.config.tie_word_embeddings:
                model.config = model.model.config = replace(model.config, tie_word_embeddings=False)
                model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
            save_model(model, folder)
        return folder

    def raw(self) -> Path:
        """The beginning of every raw source, one jsonl file."""
        path = self.root / "raw.jsonl"
        if not path.exists():
            staging = path.with_suffix(".writing")
            with staging.open("w", encoding="utf-8") as out:
                for file in sorted((self.data / "korean" / "raw").iterdir()):
                    source = file.name.split(".jsonl")[0]
                    for number, text in enumerate(first_bytes([file], self.sizes.source_megabytes * 1e6)):
                        row = {"id": f"{source}-{number}", "text": text, "source": source}
                        out.write(json.dumps(row, ensure_ascii=False) + "\n")
            staging.replace(path)
        return path

    def filtered(self) -> Path:
        """What the filter keeps of `raw`, with a validation split, its summary beside it."""
        folder = self.root / "filtered"
        if not (folder / "summary.json").exists():
            config = FilterConfig(inputs=[str(self.raw())], validation_fraction=0.02, workers=1)
            filter_corpus(config, folder)
        return folder

    def corpus(self, name: str) -> Iterator[tuple[str, str]]:
        """Source and text of every document of a corpus, "raw" or "filtered"."""
        files = [self.raw()] if name == "raw" else sorted(self.filtered().glob("train-*.parquet"))
        for file in files:
            for document in read_documents(file):
                yield document.source, document.text

    def diversity(self, name: str) -> dict[str, float]:
        """Size, sources and variety of a corpus; topics are those of the raw one."""
        path = self.root / f"diversity-{name}.json"
        if not path.exists():
            documents = list(self.corpus(name))
            texts = [text for _, text in documents]
            generator = torch.Generator().manual_seed(0)
            shuffled = [texts[place] for place in torch.randperm(len(texts), generator=generator).tolist()]
            raw = [text for _, text in self.corpus("raw")]
            topics = Topics(raw[:: max(1, len(raw) // 4_000)])
            write_json(
                path,
                {
                    "documents": len(texts),
                    "megabytes": sum(len(text.encode()) for text in texts) / 1e6,
                    "sources": len({source for source, _ in documents}),
                    "distinct_ngrams": distinct_ngrams(shuffled),
                    "topic_coverage": topics.coverage(shuffled[:4_000]),
                },
            )
        return json.loads(path.read_text(encoding="utf-8"))

    def vocabulary(self, added: int) -> Path:
        """Folder of the tokenizer with so many pieces more than the base; every size is a part of the larger ones."""
        folder = self.root / f"vocabulary-{added}"
        if not (folder / "tokenizer.model").exists():
            config = TokenizerConfig(vocab_size=self.sizes.trained_pieces, balance=0.3, threads=1)
            proto = load_model_proto(self.checkpoint / "tokenizer.model")
            words, _ = corpus_words(self.corpus("filtered"), config)
            pieces = trained_candidates(proto, words, config)
            for size in reversed(self.sizes.added):
                smaller = msgspec.structs.replace(config, max_added=size)
                pieces = select(proto, pieces, words, smaller).pieces
                target = self.root / f"vocabulary-{size}"
                target.mkdir(exist_ok=True)
                (target / "tokenizer.model").write_bytes(merge_pieces(proto, pieces).SerializeToString())
        return folder

    def tokenizer(self, added: int) -> Tokenizer:
        return Tokenizer(self.vocabulary(added) / "tokenizer.model")

    def pieces(self, added: int) -> int:
        """Pieces that were really added: fewer than asked for where the corpus has no more."""
        return self.tokenizer(added).vocab_size - Tokenizer(self.checkpoint / "tokenizer.model").vocab_size

    def initial(self, added: int, choice: str, seed: int) -> Path:
        """Checkpoint with rows for the new pieces; `seed` decides what a method draws."""
        parsed = Choice.parse(choice)
        draws = {parsed.embedding, parsed.head} & {"random", "multivariate"}
        name = "init-" + str(parsed).replace("/", "-") + (f"-seed{seed}" if draws else "")
        folder = self.vocabulary(added) / name
        if not (folder / "config.json").exists():
            pair = HybridVocabulary.open(self.checkpoint / "tokenizer.model", self.tokenizer(added).path)
            vocabulary = NewVocabulary(pair.decompositions, pair.base.surfaces, None)
            model = load_model(self.base, dtype=torch.float32) if parsed.needs_model else None
            texts = self._fit_texts(added) if parsed.needs_model else None
            made = choose_rows(self.base, vocabulary, parsed, model=model, texts=texts, seed=seed if draws else 0)
            write_extended(self.base, folder, {name: new.rows for name, new in made.items()})
        return folder

    def _fit_texts(self, added: int) -> FitTexts:
        """The beginnings of some documents of the filtered corpus and of English."""
        tokenizer, cut = self.tokenizer(added), self.sizes.sequence_length
        korean = [text[:1_000] for _, text in islice(self.corpus("filtered"), 0, 1_000, 10)]
        english = "".join(first_bytes([self.data / "english" / "gutenberg.jsonl.zst"], 5e4))
        pages = [english[begin : begin + 500] for begin in range(0, len(english), 500)]
        ids = ([torch.tensor(one[:cut]) for one in tokenizer.encode_batch(texts)] for texts in (korean, pages))
        return FitTexts(*ids)

    def packed(self, added: int, name: str) -> PackedSequences:
        """A corpus, or "english", in tokens."""
        folder = self.vocabulary(added)
        if not (folder / f"{name}-00000.json").exists():
            texts = (
                (text for text in first_bytes([self.data / "english" / "gutenberg.jsonl.zst"], 2e6))
                if name == "english"
                else (text for _, text in self.corpus(name))
            )
            pack_texts(texts, self.tokenizer(added), folder / f"{name}-00000")
        shards = TokenShards([folder / f"{name}-00000"])
        return PackedSequences(shards, self.sizes.sequence_length)

    def mixture(self, added: int, corpus: str, english: float, seed: int) -> MixedSequences:
        """A corpus with a share of English, shuffled by the seed."""
        weights = {corpus: 1 - english} | ({"english": english} if english else {})
        return MixedSequences({name: self.packed(added, name) for name in weights}, weights, seed)

    def heldout(self) -> dict[str, list[str]]:
        """Texts by domain.

        "korean" is held-out text that nothing is chosen by, "tuning" the filtered corpus' own validation split, which
        learning rates are chosen by. "wikipedia" is English; "stories" is sampled from the base at temperature 1, so
        that it is what the base knew before.
        """
        path = self.root / "heldout.json"
        if not path.exists():
            most = self.sizes.heldout_bytes
            files = [self.data / "korean" / "heldout" / f"{name}.jsonl.zst" for name in PROSE]
            validation = sorted(self.filtered().glob("validation-*.parquet"))
            texts = {
                "korean": [text for file in files for text in first_bytes([file], most)],
                "tuning": list(first_bytes(validation, 2 * most)),
                "wikipedia": list(first_bytes([self.data / "english" / "wikitext2-valid.txt"], 2 * most)),
                "stories": self._stories(),
            }
            write_json(path, texts)
        return json.loads(path.read_text(encoding="utf-8"))

    def _stories(self) -> list[str]:
        model = load_model(self.checkpoint, dtype=torch.float32).eval()
        tokenizer = Tokenizer(self.checkpoint / "tokenizer.model")
        assert tokenizer.bos_id is not None
        prompts = [[tokenizer.bos_id]] * self.sizes.stories
        length = self.sizes.sequence_length - 8
        stop = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        made = generate_batch(model, prompts, max_new_tokens=length, temperature=1.0, stop_ids=stop, seed=0)
        return [text for ids in made if (text := tokenizer.decode(ids))]


def first_bytes(files: Iterable[Path], most: float) -> Iterator[str]:
    """Texts of documents in order, up to so many UTF-8 bytes; the last one is cut."""
    room = int(most)
    for file in files:
        for document in read_documents(file):
            text = document.text.encode("utf-8", "replace")[:room].decode(errors="ignore")
            if text:
                yield text
            room -= len(text.encode())
            if room <= 0:
                return
