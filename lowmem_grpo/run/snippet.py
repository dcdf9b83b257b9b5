"""The program on a model card, which loads what was trained and lets it answer."""

from typing import Any

import transformers

from lowmem_grpo.errors import printable
from lowmem_grpo.run.facts import Facts

IN_4BITS = """\
in_4bits = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.{dtype}
)
"""
ADAPTED = """\
base = {auto}.from_pretrained(
    {base}, dtype=torch.{dtype}, device_map="auto"{further}
)
model = PeftModel.from_pretrained(base, name)
"""
MERGED = """\
model = {auto}.from_pretrained(name, dtype="auto", device_map="auto"{further})
"""
CHAT = """\
chat = [{"role": "user", "content": "..."}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
"""
PLAIN = """\
prompt = tokenizer("...", return_tensors="pt")
"""
ANSWER = """\
ids = model.generate(**prompt.to(model.device), max_new_tokens=256)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(ids, skip_special_tokens=True))"""
SCORE = """\
with torch.no_grad():
    print(model(**tokenizer("...", return_tensors="pt")).logits.item())"""


def snippet(facts: Facts, name: str, *, is_merged: bool) -> str:
    """The program, which loads `name`: a folder, or a repository on the hub."""
    named = f"name = {name!r}  # the folder of this file, or its name on the hub\n"
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(name)\n"
    if facts.base_name.startswith("./") and not is_merged:
        where = " in adapter_config.json" if facts.is_scorer else ""
        named += f"# {printable(facts.base_name)} is no name on the hub: put the base's folder in its place{where}.\n"
    if facts.is_scorer:
        imports = "from peft import AutoPeftModelForSequenceClassification\nfrom transformers import AutoTokenizer\n"
        load = "model = AutoPeftModelForSequenceClassification.from_pretrained(name, num_labels=1)\n"
        return f"import torch\n{imports}\n{named}{load}{tokenizer}{SCORE}"
    is_quantized = getattr(facts.base_config, "quantization_config", None) is not None
    quantizes = facts.settings.get("load_in_4bit", True) and not is_merged and not is_quantized
    further = ", quantization_config=in_4bits" if quantizes else ""
    further += ", trust_remote_code=True" if facts.settings.get("trust_remote_code") else ""
    auto = _class_of(facts.base_config)
    given = {"auto": auto, "base": repr(facts.base_name), "dtype": facts.dtype, "further": further}
    load = ((IN_4BITS if quantizes else "") + (MERGED if is_merged else ADAPTED)).format(**given)
    imports = f"from transformers import {auto}, AutoTokenizer{', BitsAndBytesConfig' if quantizes else ''}\n"
    if not is_merged:
        imports = f"import torch\nfrom peft import PeftModel\n{imports}"
    return f"{imports}\n{named}{load}{tokenizer}{CHAT if facts.has_chat_template else PLAIN}{ANSWER}"


def _class_of(base: Any) -> str:
    """The class that loads a base. One of more than text has the class that it was saved by, as adapters name it."""
    if base is not None and base.get_text_config() is not base:
        named = str((getattr(base, "architectures", None) or [""])[0])
        if named.isidentifier() and hasattr(transformers, named):
            return named
    return "AutoModelForCausalLM"
