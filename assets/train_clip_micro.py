"""Train clip-micro: a small CLIP on the Open Clip Art Library, in the Hugging Face CLIP format.

The library is the Debian package ``openclipart-png`` (public domain).  A caption is made from an
image's folders and title.  The images of clipart-12's validation split and everything that looks
like them are left out.  Run from the repository root, first to train, then to print the figures again:

    python assets/train_clip_micro.py --out assets/clip-micro
    python assets/train_clip_micro.py --out assets/clip-micro --evaluate

CLIP trains its class token only.  The pre-training here learns from the patch tokens, so the same
contrastive loss is also put on the mean of the projected patch tokens.  For speed the model sees a
random half of the patches (as in FLIP), and all of them in the last fifth of the training.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import shutil
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from make_clipart12 import LIBRARY, SIZE, choose, group_alike, load_library
from PIL import Image
from tokenizers.trainers import BpeTrainer
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

MEAN = (0.48145466, 0.4578275, 0.40821073)  # the values of the original CLIP
STD = (0.26862954, 0.26130258, 0.27577711)
CONTEXT, VOCABULARY = 24, 1200
# Zero-shot prompts, in the words of the library's folders.
PROMPTS = {
    "animals": "clip art of animals",
    "arrows": "clip art of arrows, shapes",
    "computers": "clip art of computer hardware",
    "flags": "clip art of flags",
    "food": "clip art of food",
    "icons": "clip art of lemon theme icons",
    "office": "clip art of office, education",
    "people": "clip art of people",
    "plants": "clip art of plants",
    "signs": "clip art of aiga symbols, roadsigns",
    "tools": "clip art of tools",
    "vehicles": "clip art of vehicles, transportation",
}


def captions_of(name: str, root: Path) -> list[str]:
    """Return four captions of one image, from its folders and the title kept in the PNG.

    Numbers, file-format words and the words of the artist's name are taken out of the title.
    """
    *folders, stem = name.removesuffix(".png").replace("-", " ").replace("_", " ").split("/")
    with Image.open(root / name) as image:
        title, author = str(image.info.get("Title", "")), str(image.info.get("Author", "")).lower()
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", f"{title} {stem}")
    artist = re.findall(r"[^\W\d_]+", author)
    words: list[str] = []
    for word in re.findall(r"[^\W\d_]+", text.lower()):
        by_artist = any(part.startswith(word) for part in artist)
        if len(word) > 1 and not by_artist and word not in (*words, "bw", "md", "svg", "inkscape"):
            words.append(word)
    label = " ".join(words[:6]) or folders[-1]
    path = ", ".join(reversed(folders))
    top = folders[0]
    return [f"clip art of {path}", f"clip art of {label}, {path}", f"{top}, {label}", f"clip art of {top}"]


def training_images(names: list[str], images: np.ndarray, most: int = 250) -> list[int]:
    """Return the images to train on: no look-alike of clipart-12's val, no copies, `most` a folder."""
    groups = group_alike(names, images)
    chosen = choose(names, images, groups)
    held_out = {int(groups[i]) for (split, _), indices in chosen.items() if split == "val" for i in indices}
    seen: set[bytes] = set()
    per_folder: Counter[str] = Counter()
    kept = []
    for index in np.random.default_rng(0).permutation(len(names)).tolist():
        pixels, folder = images[index].tobytes(), names[index].rsplit("/", 1)[0]
        if int(groups[index]) in held_out or pixels in seen or per_folder[folder] >= most:
            continue
        seen.add(pixels)
        per_folder[folder] += 1
        kept.append(index)
    return kept


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Train a small BPE vocabulary on the captions and return it as a CLIP tokenizer."""
    backend = CLIPTokenizer().backend_tokenizer
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(captions, trainer)
    state = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    return CLIPTokenizer(vocab=state["vocab"], merges=merges, model_max_length=CONTEXT)


def make_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return an untrained CLIP of 1.7 M parameters."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 3}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, "projection_dim": 128}
    text |= ends | {"pad_token_id": tokenizer.pad_token_id}
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    vision |= {"image_size": SIZE, "patch_size": 16, "projection_dim": 128, "hidden_act": "gelu"}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return token ids padded or cut to the context length."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, max_length=CONTEXT)
    return torch.tensor(encoded["input_ids"])


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Bring RGB in 0..1 to the mean and spread the model expects."""
    return (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def augment(batch: np.ndarray) -> torch.Tensor:
    """Random resized crop (0.6 to 1 of the area), flip and colour changes on a uint8 NHWC batch."""
    pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255
    n = len(pixels)
    area, ratio = torch.empty(n).uniform_(0.6, 1.0), torch.empty(n).uniform_(-0.2, 0.2).exp().sqrt()
    scale = torch.stack([area.sqrt() * ratio, area.sqrt() / ratio], 1).clamp(max=1.0)
    shift = (torch.rand(n, 2) * 2 - 1) * (1 - scale)
    flip = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale[:, 0] * flip, scale[:, 1], shift
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    grey = pixels.mean(1, keepdim=True)
    saturation = torch.empty(n, 1, 1, 1).uniform_(0.5, 1.4) * (torch.rand(n, 1, 1, 1) > 0.1)
    gain = torch.empty(n, 3, 1, 1).uniform_(0.85, 1.1) * torch.empty(n, 1, 1, 1).uniform_(0.7, 1.1)
    return normalise(((grey + saturation * (pixels - grey)) * gain).clamp(0, 1))


def image_features(
    model: CLIPModel, pixels: torch.Tensor, share: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the projected class token (N, D) and the projected patch tokens (N, L, D).

    With share below 1 the encoder sees that share of the patches, drawn anew for every image.
    """
    vision = model.vision_model
    tokens = vision.pre_layrnorm(vision.embeddings(pixels))
    if share < 1:
        patches = torch.rand(tokens.shape[0], tokens.shape[1] - 1).argsort(1) + 1
        patches = patches[:, : round(share * patches.shape[1])]
        rows = torch.cat([torch.zeros_like(patches[:, :1]), patches], 1)
        tokens = tokens.gather(1, rows.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    tokens = vision.encoder(inputs_embeds=tokens).last_hidden_state
    projected = model.visual_projection(vision.post_layernorm(tokens))
    return projected[:, 0], projected[:, 1:]


def text_features(model: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the projected text features (N, D)."""
    return model.text_projection(model.text_model(input_ids=ids).pooler_output)


def contrastive(
    image: torch.Tensor, text: torch.Tensor, same: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Symmetric InfoNCE; `same` spreads the target evenly over images with the very same caption."""
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


def train(args: argparse.Namespace) -> None:
    """Train from scratch and write the model folder every ten epochs and at the end."""
    names, images = load_library(args.root, args.cache)
    kept = training_images(names, images)
    captions = [captions_of(names[index], args.root) for index in kept]
    tokenizer = make_tokenizer([caption for group in captions for caption in group])
    ids = torch.stack([tokenize(tokenizer, list(column)) for column in zip(*captions, strict=True)])
    model = make_model(tokenizer)
    steps = len(kept) // args.batch
    total = steps * args.epochs
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    warm = steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, s / total))) + 0.01),
    )
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(kept)} images, {len(tokenizer)} tokens, {count / 1e6:.2f} M parameters", flush=True)
    start = time.perf_counter()
    for epoch in range(1, args.epochs + 1):
        model.train()
        order = torch.randperm(len(kept))
        losses = []
        for step in range(steps):
            rows = order[step * args.batch : (step + 1) * args.batch]
            pixels = augment(images[[kept[row] for row in rows.tolist()]])
            batch_ids = ids[torch.randint(len(ids), (len(rows),)), rows]
            same = (batch_ids[:, None] == batch_ids[None]).all(-1).float()
            same = same / same.sum(1, keepdim=True)
            share = 0.5 if epoch <= 0.8 * args.epochs else 1.0
            token, patches = image_features(model, pixels, share)
            text = text_features(model, batch_ids)
            scale = model.logit_scale.exp().clamp(max=100)
            loss = contrastive(token, text, same, scale) + contrastive(patches.mean(1), text, same, scale)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch} loss {np.mean(losses):.3f} {time.perf_counter() - start:.0f} s", flush=True)
        if epoch % 10 == 0 or epoch == args.epochs:
            save(model, tokenizer, args.out)
            evaluate(args.out, args.tar)


def save(model: CLIPModel, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Write the model folder (weights as float16, to be loaded as float32) and put it in place at once."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    copy = CLIPModel(model.config)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(fresh)
    config = json.loads((fresh / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (fresh / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(fresh)
    square = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=square, image_mean=list(MEAN), image_std=list(STD)
    ).save_pretrained(fresh)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def read_tar(path: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised images and the class numbers of one split of clipart-12."""
    pixels, labels, order = [], [], sorted(PROMPTS)
    with tarfile.open(path) as archive:
        for member in archive:
            where, label, _ = member.name.split("/")
            if where == split:
                data = archive.extractfile(member).read()
                pixels.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
                labels.append(order.index(label))
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return normalise(stacked), torch.tensor(labels)


@torch.no_grad()
def all_features(model: CLIPModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the class-token features and the mean of the layer-normed patch features."""
    parts = [image_features(model, chunk) for chunk in pixels.split(128)]
    mean = [F.layer_norm(patches, patches.shape[-1:]).mean(1) for _, patches in parts]
    return torch.cat([token for token, _ in parts]), torch.cat(mean)


def linear_probe(
    train_x: torch.Tensor, train_y: torch.Tensor, val_x: torch.Tensor, val_y: torch.Tensor
) -> float:
    """Fit a linear classifier on frozen features and return its validation accuracy."""
    mean, spread = train_x.mean(0), train_x.std(0) + 1e-6
    head = torch.nn.Linear(train_x.shape[1], len(PROMPTS))
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(head((train_x - mean) / spread), train_y).backward()
        optimizer.step()
    return (head((val_x - mean) / spread).argmax(1) == val_y).float().mean().item()


def evaluate(folder: Path, tar: Path) -> None:
    """Print zero-shot accuracy and linear-probe accuracies of the stored model on clipart-12."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel.from_pretrained(folder).eval()
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        train_pixels, train_y = read_tar(tar, "train")
        val_pixels, val_y = read_tar(tar, "val")
        with torch.no_grad():
            text = text_features(model, tokenize(tokenizer, [PROMPTS[label] for label in sorted(PROMPTS)]))
        train_token, train_mean = all_features(model, train_pixels)
        val_token, val_mean = all_features(model, val_pixels)
        untrained = make_model(tokenizer).eval()
        blank = [all_features(untrained, pixels)[1] for pixels in (train_pixels, val_pixels)]
        figures = {}
        for kind, features in (("class token", val_token), ("patch mean", val_mean)):
            logits = F.normalize(features, dim=-1) @ F.normalize(text, dim=-1).T
            figures[f"zero-shot, {kind}"] = (logits.argmax(1) == val_y).float().mean().item()
        figures["linear probe, class token"] = linear_probe(train_token, train_y, val_token, val_y)
        figures["linear probe, patch mean"] = linear_probe(train_mean, train_y, val_mean, val_y)
        figures["linear probe, patch mean, untrained"] = linear_probe(blank[0], train_y, blank[1], val_y)
    for name, value in figures.items():
        print(f"{name:36} {100 * value:.1f} %", flush=True)


def main() -> None:
    """Train and evaluate, or evaluate only."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=LIBRARY, help="folder of the installed PNGs")
    parser.add_argument("--out", type=Path, default=Path("assets/clip-micro"))
    parser.add_argument("--tar", type=Path, default=Path("assets/clipart-12.tar"), help="for the evaluation")
    parser.add_argument("--cache", type=Path, help="an .npz file that keeps the decoded library")
    parser.add_argument("--evaluate", action="store_true", help="only measure the model in --out")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.evaluate:
        evaluate(args.out, args.tar)
    else:
        train(args)


if __name__ == "__main__":
    main()
