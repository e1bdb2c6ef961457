"""What happens to a process that streams: its exit, and Ctrl-C."""

import signal
import subprocess
import sys
import time

import pytest

QUESTION = [{"role": "user", "content": "Tell me a story about Nora the fox."}]


def run_script(demo_dir, device, body, **options):
    # A test run in the background may have SIGINT ignored, and children inherit that.
    code = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += (
        f"import sys\nfrom qwen_fast import LLM, SamplingParams\n"
        f"llm = LLM({str(demo_dir)!r}, device={device!r}, kv_cache_tokens=8192)\n"
    )
    code += f"question = {QUESTION!r}\nendless = SamplingParams(ignore_eos=True, max_tokens=3000)\n{body}"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_interpreter_exit_in_the_middle_of_a_stream(demo_dir, device):
    body = "stream = llm.stream(question, endless)\nprint(next(stream).token_ids != [], flush=True)\n"
    process = run_script(demo_dir, device, body)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "True\n", "")


def test_interpreter_exit_while_a_thread_reads(demo_dir, device):
    body = "import threading, time\n"
    body += "threading.Thread(target=lambda: list(llm.stream(question, endless)), daemon=True).start()\n"
    process = run_script(demo_dir, device, body + "time.sleep(0.2)\nprint('end')\n")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "end\n", "")


@pytest.mark.parametrize(
    "call", ["list(llm.stream(question, endless))", "llm.generate(['a'] * 4, endless, progress=False)"]
)
def test_ctrl_c_leaves_the_engine_usable(demo_dir, device, call):
    body = (
        "print('ready', flush=True)\n"
        f"try:\n    {call}\n    print('not interrupted')\nexcept KeyboardInterrupt:\n    print('interrupted')\n"
        "out = llm.chat(question, SamplingParams(max_tokens=4, temperature=0))[0]\n"
        "print(len(out.outputs[0].token_ids))\n"
        "print(llm.stats()['num_running'])\n"
    )
    process = run_script(demo_dir, device, body)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert output == "interrupted\n4\n0\n"
