"""One small tokenizer per family, trained on corpus.txt, in the exact pipeline of the real one."""
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from . import templates

CORPUS = Path(__file__).with_name("corpus.txt")

SPLIT_COMMON = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_LLAMA3 = SPLIT_COMMON.format(digits=r"\p{N}{1,3}")
SPLIT_QWEN = SPLIT_COMMON.format(digits=r"\p{N}")

LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                   "<|finetune_right_pad_id|>"]
QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# name -> the fields of tokenizer_config.json which differ between the families
CONFIGS = {
    "llama3": dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|finetune_right_pad_id|>",
                   chat_template=templates.LLAMA3),
    "llama3-generation": dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
                              pad_token="<|finetune_right_pad_id|>", chat_template=templates.LLAMA3_GENERATION),
    "mistral": dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>", add_bos_token=True,
                    add_eos_token=False, legacy=True, chat_template=templates.MISTRAL),
    "qwen2": dict(bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=templates.QWEN2),
    "qwen3": dict(bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=templates.QWEN3),
}


def corpus_lines():
    return CORPUS.read_text(encoding="utf-8").splitlines()


def train(kind, vocab_size):
    """The Tokenizer of `kind` with exactly `vocab_size` entries."""
    tok = sentencepiece_like(vocab_size) if kind == "mistral" else byte_level(kind, vocab_size)
    assert tok.get_vocab_size() == vocab_size, (kind, tok.get_vocab_size(), vocab_size)
    return tok


def byte_level(kind, vocab_size):
    """Llama 3 and Qwen: regex split, then byte-level BPE; the special tokens come after the vocabulary."""
    llama = kind.startswith("llama3")
    specials = LLAMA3_SPECIALS if llama else QWEN_SPECIALS
    words = ["<think>", "</think>"] if kind == "qwen3" else []  # added tokens that are not special, as in Qwen3
    tok = Tokenizer(models.BPE(ignore_merges=llama))
    if not llama:
        tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_LLAMA3 if llama else SPLIT_QWEN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(specials) - len(words), min_frequency=2,
                                  show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tok.train_from_iterator(corpus_lines(), trainer)
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tok.add_tokens([AddedToken(s, special=False, normalized=False) for s in words])
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    if llama:
        tok.post_processor = processors.Sequence([tok.post_processor, bos_processor(tok, "<|begin_of_text|>")])
    return tok


def sentencepiece_like(vocab_size):
    """Mistral v0.1: a BPE over characters with byte fallback; spaces become "▁" in the normaliser, there is no
    pre-tokenizer. Merges are learnt within words only (as sentencepiece does), so a Metaspace splits the corpus."""
    words = {f"<0x{b:02X}>": 0 for b in range(256)}
    front = ["<unk>", "<s>", "</s>"] + list(words)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    learner.train_from_iterator(corpus_lines(), trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=front))
    learnt = json.loads(learner.to_str())["model"]
    tok = Tokenizer(models.BPE(vocab=learnt["vocab"], merges=[tuple(m) for m in learnt["merges"]], unk_token="<unk>",
                               fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in front[:3]])
    tok.post_processor = bos_processor(tok, "<s>")
    return tok


def bos_processor(tok, bos):
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
                                         special_tokens=[(bos, tok.token_to_id(bos))])


def write(folder, kind, tok, template_file):
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json (and chat_template.jinja, as transformers v5)."""
    tok.save(str(folder / "tokenizer.json"), pretty=False)
    config = dict(CONFIGS[kind])
    if template_file:
        (folder / "chat_template.jinja").write_text(config.pop("chat_template"), encoding="utf-8")
    config.update(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False, model_max_length=2048)
    names = [k for k in ("bos_token", "eos_token", "unk_token", "pad_token") if config.get(k)]
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {k: config[k] for k in names})


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
