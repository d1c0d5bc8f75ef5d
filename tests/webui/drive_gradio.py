"""Run by the Python of an environment with an old gradio, and no torch.

Builds the whole interface in the fake host, serves it on loopback, uses it, and prints what it saw as JSON.
"""

import inspect
import json
import sys
import tempfile
import types
from pathlib import Path

import gradio as gr
from gradio_client import Client

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "fake_webui"))

from modules import paths, script_callbacks, scripts, sd_models, shared  # noqa: E402


def prepare(folder):
    """Files for the pickers; their content is not read here."""
    for name in ("Lora/dog", "Lora/animals/fox", "mole/dog+fox"):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    paths.models_path, paths.data_path = str(folder), str(folder / "data")
    shared.cmd_opts.lora_dir = str(folder / "Lora")
    sd_models.checkpoints_list["one"] = types.SimpleNamespace(
        title="sd15.safetensors [abc]", filename="/sd15.safetensors"
    )


def build():
    """As the hosts do: settings, tabs, and each script's panel twice."""
    script_callbacks.call("before_ui")
    script_callbacks.call("ui_settings")
    tabs = script_callbacks.call("ui_tabs")
    panels = {}
    with gr.Blocks() as demo:
        for is_img2img in (False, True):
            runner, name = scripts.ScriptRunner(is_img2img), "img2img" if is_img2img else "txt2img"
            for script in runner.scripts:
                with gr.Tab(name):
                    prompt = gr.Textbox(label="Prompt", elem_id=f"{name}_prompt")
                    runner.after_component(prompt, elem_id=f"{name}_prompt")
                    panels[is_img2img] = script.ui(is_img2img), script
        for blocks, title, _ in tabs[0]:
            with gr.Tab(title):
                blocks.render()
    return demo, panels


def event(config, elem_id, trigger="click"):
    """Index of the first event of a component."""
    found = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == elem_id)
    for index, dependency in enumerate(config["dependencies"]):
        # 3.41 has one trigger for all targets, 4.40 a trigger for each.
        targets = dependency["targets"]
        pairs = [tuple(t) if isinstance(t, (list, tuple)) else (t, dependency["trigger"]) for t in targets]
        if (found, trigger) in pairs:
            return index
    raise LookupError(elem_id)


def main():
    folder = Path(tempfile.mkdtemp())
    prepare(folder)
    scripts.load_script(str(ROOT / "webui_extension" / "scripts" / "mole.py"))
    demo, panels = build()
    config = demo.get_config_file()
    controls, script = panels[False]
    pasted = {
        "MoLE experts": "dog: 0.5 | animals/fox: 1",
        "MoLE gates": "dog+fox",
        "MoLE regions": "dog: left half",
    }
    seen = {
        "gradio": gr.__version__,
        "failures": script_callbacks.failures,
        "torch": "torch" in sys.modules,
        "labels": [control.label for control in controls],
        "values": [control.value for control in controls],
        "pasted": [field(pasted) for _, field in script.infotext_fields],
        "pasted_none": [field({}) for _, field in script.infotext_fields],
        "ids": sorted(c["props"]["elem_id"] for c in config["components"] if c["props"].get("elem_id")),
    }
    demo.queue()
    _, url, _ = demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, show_api=False)
    # Updates of pictures as they are: the older client takes them for files.
    raw = {"serialize": False} if "serialize" in inspect.signature(Client).parameters else {}
    client = Client(url, verbose=False, **raw)
    (folder / "Lora" / "new.safetensors").write_bytes(b"")

    def use(elem_id, *values, trigger="click"):
        return json.loads(
            json.dumps(client.predict(*values, fn_index=event(config, elem_id, trigger)), default=str)
        )

    seen["refreshed"] = use("script_txt2img_mole_mole_refresh")
    rows = ["dog", "animals/fox", "", "", "left half", "0.5 0 0.5 1", "everywhere", "everywhere"]
    seen["sketch"] = use("script_txt2img_mole_mole_expert_0", *rows, trigger="change")
    # The client leaves out what rows become.
    seen["rows"] = demo.fns[event(config, "script_txt2img_mole_mole_expert_0", "change")].fn(*rows)
    inserts = config["dependencies"][event(config, "script_img2img_mole_mole_insert")]
    ids = {c["id"]: c["props"].get("elem_id") for c in config["components"]}
    seen["inserts"] = [ids[i] for i in inserts["inputs"][:2]], [ids[i] for i in inserts["outputs"]]
    seen["heat_map"] = use("script_img2img_mole_mole_show")
    training = [
        "x",
        "sd15.safetensors [abc]",
        ["dog", "animals/fox"],
        "a dog",
        "",
        "",
        "collage",
        False,
        5,
        0,
    ]
    seen["train"] = use("mole_train_start", *training)
    seen["watch"] = use("mole_train_watch")
    seen["cancel"] = use("mole_train_cancel")
    seen["python"] = use("mole_python_check")
    demo.close()
    print(json.dumps(seen))


main()
