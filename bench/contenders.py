"""The contenders of train_step.py and memory.py: each trains on the same rows and calls ``begin`` before every step.

Runs in each contender's own virtual environment, where Infuse may be missing and transformers older: whatever is not
torch is imported where it is used. A contender is described by a specification (see workers.py):

- ``fit``: what ``infuse train`` does, length buckets and the trunk's precision included.
- ``trainer``: as users run PEFT, ``adapters`` or transformers: its Trainer, float32, random batches padded to their
  longest row, default arguments.
- ``loop``: a plain PyTorch loop over given batches, with or without bfloat16 autocast.
- ``floor``: nothing but matrix products (floor.py).
"""

import tempfile
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

Spec = dict[str, Any]
Begin = Callable[[Any, Any], None]
"""Called with the model and the optimizer before every step; it returns when the step may go on."""

ADAPTERS = {
    "ia3": "ia3",
    "lora": "lora",
    "houlsby": "double_seq_bn",
    "pfeiffer": "seq_bn",
    "compacter": "compacter",
    "fusion": "seq_bn",
}
"""Our name of a method → that of ``adapters``."""
PEFT = ("ia3", "lora")
MEMBERS = [f"member{i}" for i in range(4)]
"""What the mixer of ``fusion`` mixes: fresh Pfeiffer adapters, frozen."""


def train(spec: Spec, loaded: Callable[[], None], begin: Begin) -> None:
    """Train as ``spec`` says until the rows are used up; ``loaded`` is called when the bare base is in memory."""
    torch.manual_seed(0)
    data = torch.load(spec["rows"])
    {"fit": _fit, "trainer": _trainer, "loop": _loop, "floor": _floor}[spec["loop"]](spec, data, loaded, begin)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _fit(spec: Spec, data: dict[str, Any], loaded: Callable[[], None], begin: Begin) -> None:
    import infuse
    from infuse.bases import load_base
    from infuse.data import read
    from infuse.training.fit import fit
    from infuse.training.settings import Settings

    method, rows = spec["method"], read(spec["csv"])
    epochs = 1 + spec["steps"] * spec["batch"] // len(rows)
    settings = Settings(method=method, epochs=epochs, batch_size=spec["batch"], max_length=spec["max_length"])
    base = load_base(spec["base"], precision="fp32" if method == "full" else settings.precision)
    base.model.to(device())
    callback = _callback(begin)
    loaded()
    members = MEMBERS if method == "fusion" else []
    for name in members:
        infuse.attach(base.model, "pfeiffer", name, trained=())
    fit(base, rows, None, settings, callbacks=[callback], members=members)


def _trainer(spec: Spec, data: dict[str, Any], loaded: Callable[[], None], begin: Begin) -> None:
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

    if spec["library"] == "adapters":
        from adapters import AdapterTrainer as Trainer
    callback = _callback(begin)
    model = _model(spec, data, loaded)
    rows = [
        {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": label}
        for tokens, label in zip(data["tokens"], data["labels"], strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=spec["batch"],
            max_steps=spec["steps"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(spec["base"], trust_remote_code=False))
        Trainer(model=model, args=args, train_dataset=rows, data_collator=collator, callbacks=[callback]).train()


def _loop(spec: Spec, data: dict[str, Any], loaded: Callable[[], None], begin: Begin) -> None:
    model = _model(spec, data, loaded).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
    fusing = spec["method"] == "fusion"
    for index in _order(spec, data):
        begin(model, optimizer)
        batch = {k: v.to(device()) for k, v in _batch(data, index).items()}
        with torch.autocast(device().type, torch.bfloat16, enabled=spec["autocast"]):
            loss = model(**batch)["loss"]
        if fusing and spec["library"] == "ours":
            from infuse.model import penalty

            loss = loss + penalty(model, "fused")
        loss.backward()
        if fusing and spec["library"] == "adapters":
            model.base_model.get_fusion_regularization_loss().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _floor(spec: Spec, data: dict[str, Any], loaded: Callable[[], None], begin: Begin) -> None:
    from floor import products

    loaded()
    run = products(spec, max(map(len, data["tokens"])), device())
    shapes = [(len(index), max(len(data["tokens"][i]) for i in index)) for index in _order(spec, data)]
    for shape in set(shapes):
        run(*shape)  # the first call for a shape compiles its kernels, which is no part of a floor
    for shape in shapes:
        begin(None, None)
        run(*shape)


def _callback(begin: Begin) -> Any:
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            begin(model, optimizer)

    return Callback()


def _order(spec: Spec, data: dict[str, Any]) -> Iterator[list[int]]:
    """The batches of rows: of similar lengths in the order of our own sampler, or at random."""
    if spec["bucketed"]:
        yield from islice(cycle(data["order"]), spec["steps"])
    else:
        for _ in range(spec["steps"]):
            yield torch.randint(len(data["tokens"]), (spec["batch"],)).tolist()


def _batch(data: dict[str, Any], index: list[int]) -> dict[str, Tensor]:
    """Padded at the end to the longest row. Without labels per row, it is a language model's batch."""
    tokens = [torch.tensor(data["tokens"][i]) for i in index]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=data["pad_id"])
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
    if data["labels"] is None:
        labels = ids.masked_fill(mask == 0, -100)
    else:
        labels = torch.tensor([data["labels"][i] for i in index])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _model(spec: Spec, data: dict[str, Any], loaded: Callable[[], None]) -> Any:
    """The library's model with a fresh adapter of the method, and a classification head, to be trained."""
    if spec["library"] == "adapters":
        return _of_adapters(spec, data, loaded)
    model: Any = _bare(spec, data).to(device())
    task = "CAUSAL_LM" if data["labels"] is None else "SEQ_CLS"
    if spec["library"] == "peft":
        import peft

        loaded()
        config = {"ia3": peft.IA3Config, "lora": peft.LoraConfig}[spec["method"]]
        return peft.get_peft_model(model, config(task_type=task))
    if spec["library"] == "ours":
        import infuse

        loaded()
        if spec["method"] != "fusion":
            infuse.attach(model, spec["method"], "task")
            return model
        for name in MEMBERS:
            infuse.attach(model, "pfeiffer", name, trained=())
        infuse.fuse(model, MEMBERS, name="fused")
        model.classifier.requires_grad_(True)
        return model
    loaded()
    return model


def _of_adapters(spec: Spec, data: dict[str, Any], loaded: Callable[[], None]) -> Any:
    from adapters import AutoAdapterModel, Fuse

    model = AutoAdapterModel.from_pretrained(spec["base"], trust_remote_code=False).to(device())
    loaded()
    kind = ADAPTERS[spec["method"]]
    members = MEMBERS if spec["method"] == "fusion" else ["task"]
    for name in members:
        model.add_adapter(name, config=kind)
    model.add_classification_head("head", num_labels=data["classes"])
    if len(members) == 1:
        model.train_adapter("task")
    else:
        model.add_adapter_fusion(Fuse(*members))
        model.train_adapter_fusion(Fuse(*members))
    return model.to(device())


def _bare(spec: Spec, data: dict[str, Any]) -> nn.Module:
    import transformers

    if spec["llama"]:
        config = transformers.LlamaConfig(**spec["llama"])
        with device():
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    auto: Any = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(spec["base"], num_labels=data["classes"], trust_remote_code=False)
