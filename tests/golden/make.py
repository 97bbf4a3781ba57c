"""Rewrite tests/golden/*.json from llama.cpp's own converter (`make golden`); needs torch and transformers.

    python tests/golden/make.py [CASE...]       all cases, or these

The converter comes out of the sdist of the pinned llama-cpp-python. Two things are told to it: the name of the byte-level
pre-tokenizer, which it looks up by a hash that only published vocabularies have; and where Baichuan's tensors that are not
packed go, which it asks itself, for ever.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "tools")]

import cases  # noqa: E402
import reference  # noqa: E402


def main() -> None:
    source = reference.source()
    sys.path[:0] = [str(source / "gguf-py"), str(source)]
    for name in [m for m in sys.modules if m.split(".")[0] == "gguf"]:
        del sys.modules[name]  # the converter wants its own, newer copy

    import torch
    from conversion import ModelBase, ModelType, get_model_class
    from conversion.baichuan import BaichuanModel
    from conversion.base import TextModel, get_model_architecture, gguf

    unpack = BaichuanModel.modify_tensors

    def modify_tensors(self, data, name, layer):  # conversion/baichuan.py calls itself where it means its parent
        return (unpack if "W_pack" in name else TextModel.modify_tensors)(self, data, name, layer)

    BaichuanModel.modify_tensors = modify_tensors
    types = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "f32": "ALL_F32", "q8_0": "MOSTLY_Q8_0"}
    for case in sys.argv[1:] or cases.CASES:
        settings = cases.CASES[case]
        TextModel.get_vocab_base_pre = lambda self, tokenizer, pre=settings["vocab"]: pre
        golden = {"llama_cpp_python": version("llama-cpp-python"), "outtypes": {}}
        with tempfile.TemporaryDirectory() as scratch:
            model = cases.make(case, Path(scratch))
            for outtype in cases.outtypes(case):
                out = Path(scratch) / f"{outtype}.gguf"
                with torch.inference_mode():
                    config = ModelBase.load_hparams(model, False)
                    converter = get_model_class(get_model_architecture(config, ModelType.TEXT))
                    converter(model, gguf.LlamaFileType[types[outtype]], out).write()
                found = cases.fingerprint(out)
                if outtype == "f16":
                    golden["keys"] = found["keys"]
                golden["outtypes"][outtype] = found["tensors"]
        (HERE / f"{case}.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
        print(case)


if __name__ == "__main__":
    main()
