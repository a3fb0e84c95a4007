"""Tiny random models, tokenizers and data, made where they are needed."""

import csv
import json
import random

import torch

GOOD, BAD = ["good", "fine", "great", "nice", "happy"], ["bad", "poor", "awful", "sad", "angry"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
         "initializer_range": 0.2}  # fmt: skip
WORDS = [*GOOD, *BAD, "the", "a", "film", "food", "place", "day", "was", "is", "very", "and"]


def tokenizer(path, chat=False):
    """A tokenizer that knows WORDS, saved in `path`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    fast.eos_token = "[SEP]"
    if chat:
        fast.chat_template = "{% for m in messages %}[CLS] {{ m.content }} [SEP] {% endfor %}"
    fast.save_pretrained(path)
    return fast


def bert(path):
    """A random BERT without a head, with its tokenizer."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(tokenizer(path)),
        **SMALL,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(path)
    return str(path)


def roberta(path):
    """A random RoBERTa without a head, with its tokenizer."""
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(7)
    config = RobertaConfig(
        vocab_size=len(tokenizer(path)),
        **SMALL,
        max_position_embeddings=40,
        type_vocab_size=2,
        pad_token_id=0,
    )
    RobertaModel(config).save_pretrained(path)
    return str(path)


def llama(path, chat=False, hidden=32, intermediate=48):
    """A random Llama, with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer(path, chat)),
        **SMALL | {"hidden_size": hidden, "intermediate_size": intermediate},
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def t5(path):
    """A random T5, with its tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(7)
    config = T5Config(
        vocab_size=len(tokenizer(path)),
        **{"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2},
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    T5ForConditionalGeneration(config).save_pretrained(path)
    return str(path)


def whisper(path):
    """A random Whisper of one second, with its processor; it knows the letters."""
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    torch.manual_seed(7)
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    vocabulary = {token: i for i, token in enumerate([*"abcdefghijklmnopqrstuvwxyz", "Ġ", *special])}
    words = WhisperTokenizer(vocab=vocabulary, merges=[], pad_token=special[0], model_max_length=20)
    words.add_special_tokens({"additional_special_tokens": special[1:]})
    maker = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    WhisperProcessor(maker, words).save_pretrained(path)
    config = WhisperConfig(
        vocab_size=len(words), num_mel_bins=8, d_model=32, encoder_layers=1, decoder_layers=1, dropout=0.0,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=50, max_target_positions=20, pad_token_id=27, bos_token_id=27, eos_token_id=27,
        decoder_start_token_id=28, suppress_tokens=None, begin_suppress_tokens=None, init_std=0.3,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.no_timestamps_token_id = 29
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    model.save_pretrained(path)
    return str(path)


def wav2vec2(path):
    """A random wav2vec 2.0 without a layer over the letters, with its processor; it knows the letters."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2Model,
        Wav2Vec2Processor,
    )

    torch.manual_seed(7)
    vocabulary = ["<pad>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"]
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    words = Wav2Vec2CTCTokenizer(str(path / "vocab.json"), bos_token=None, eos_token=None)
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=False), words).save_pretrained(path)
    config = Wav2Vec2Config(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        conv_dim=(16, 16), conv_kernel=(40, 8), conv_stride=(20, 8), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, mask_time_prob=0.0, pad_token_id=0, hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0, num_feat_extract_layers=2,
        initializer_range=0.2,
    )  # fmt: skip
    Wav2Vec2Model(config).save_pretrained(path)
    return str(path)


def tones(path, n, seed=0, rate=8000):
    """n rows {audio (a WAV file in `path`), text}: a low tone or a high one, and what it is called."""
    import numpy as np
    import soundfile

    draw, rows = np.random.default_rng(seed), []
    path.mkdir(exist_ok=True)
    for i in range(n):
        text = ["low", "high"][int(draw.integers(2))]
        pitch = (250 if text == "low" else 1500) * draw.uniform(0.95, 1.05)
        samples = 0.5 * np.sin(2 * np.pi * pitch * np.arange(rate // 2) / rate) + 0.01 * draw.normal(size=rate // 2)
        soundfile.write(path / f"{seed}-{i}.wav", samples, rate)
        rows.append({"audio": f"{path.name}/{seed}-{i}.wav", "text": text})
    return rows


def reviews(n, seed=0):
    """n rows {text, label}: four words about something, one of them telling."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        label = draw.choice(["good", "bad"])
        telling = draw.choice(GOOD if label == "good" else BAD)
        rows.append({"text": f"the {draw.choice(WORDS[12:15])} was {telling}", "label": label})
    return rows


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def table(path, rows, separator=","):
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def pictures(n, seed=0, side=16):
    """n rows {image (PNG bytes), label}: noise with more red or more green in it."""
    import io

    import numpy as np
    from PIL import Image

    draw, rows = np.random.default_rng(seed), []
    for _ in range(n):
        label = int(draw.integers(2))
        pixels = draw.integers(0, 200, (side, side, 3), dtype=np.uint8)
        pixels[..., label] += 50
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
        rows.append({"image": buffer.getvalue(), "label": ["red", "green"][label]})
    return rows


def classes(path, splits):
    """{split: rows} as a folder of images, SPLIT/CLASS/NUMBER.png."""
    for split, rows in splits.items():
        for i, row in enumerate(rows):
            file = path / split / row["label"] / f"{i:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(row["image"])
    return str(path)


def image_processor(path, side=16):
    """An image processor that brings images to `side`, saved in `path`."""
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(path)


def vit(path, side=16):
    """A random ViT without a head, with its image processor."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(7)
    image_processor(path, side)
    config = ViTConfig(
        **SMALL,
        image_size=side,
        patch_size=8,
    )
    ViTModel(config).save_pretrained(path)
    return str(path)


def efficientnet(path):
    """A random EfficientNet-Lite of two stages, its statistics those of some noise, with its image processor."""
    from undula.bundled import efficientnet as room

    torch.manual_seed(7)
    image_processor(path)
    config = room.EfficientNetLiteConfig(stem=8, stages=((1, 8, 3, 1, 1), (2, 12, 3, 2, 2)), top=32, num_labels=3)
    model = room.EfficientNetLiteForImageClassification(config)
    for name, p in model.named_parameters():
        if p.ndim == 4:
            torch.nn.init.kaiming_normal_(p, generator=torch.Generator().manual_seed(len(name)))
    for _ in range(20):
        model.train()(torch.randn(16, 3, 16, 16))
    model.save_pretrained(path)
    return str(path)


def modernbert(path):
    """A random ModernBERT without a head, with its tokenizer."""
    from transformers import ModernBertConfig, ModernBertModel

    torch.manual_seed(7)
    size = {k: v for k, v in SMALL.items() if k != "initializer_range"}
    made = tokenizer(path)
    made.model_input_names = ["input_ids", "attention_mask"]
    made.save_pretrained(path)
    config = ModernBertConfig(
        vocab_size=len(made), **size, max_position_embeddings=40, pad_token_id=0, cls_token_id=2, sep_token_id=3,
        bos_token_id=2, eos_token_id=3, initializer_cutoff_factor=20.0,
    )  # fmt: skip
    ModernBertModel(config).save_pretrained(path)
    return str(path)


def distilbert(path):
    """A random DistilBERT without a head, with its tokenizer."""
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(7)
    made = tokenizer(path)
    made.model_input_names = ["input_ids", "attention_mask"]
    made.save_pretrained(path)
    config = DistilBertConfig(
        vocab_size=len(made), dim=32, n_layers=2, n_heads=2, hidden_dim=48, initializer_range=0.2, pad_token_id=0,
        max_position_embeddings=40,
    )  # fmt: skip
    DistilBertModel(config).save_pretrained(path)
    return str(path)


def deberta(path):
    """A random DeBERTa v3 without a head, with its tokenizer: distances go through the layers of queries and keys."""
    from transformers import DebertaV2Config, DebertaV2Model

    torch.manual_seed(7)
    config = DebertaV2Config(
        vocab_size=len(tokenizer(path)), **SMALL, max_position_embeddings=40, relative_attention=True,
        position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"],
        position_biased_input=False, type_vocab_size=0, pad_token_id=0,
    )  # fmt: skip
    DebertaV2Model(config).save_pretrained(path)
    return str(path)
