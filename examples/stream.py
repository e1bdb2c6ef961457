"""Streams a story from the demo model, then asks for several things at once.

python examples/stream.py
python examples/stream.py /path/to/Qwen2.5-0.5B-Instruct
"""

import sys

from qwen_fast import LLM, SamplingParams


def main() -> None:
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
        messages = [{"role": "user", "content": "Tell me a story about Nora the fox."}]
        for piece in llm.stream(messages, SamplingParams(max_tokens=120, seed=1)):
            print(piece.text, end="", flush=True)
        print("\n")

        questions = ["What is 128 + 256?", "Explain a cache.", "Reverse this list: island, toad, river"]
        greedy = SamplingParams(temperature=0, max_tokens=60)
        for question, output in zip(questions, llm.chat([[{"role": "user", "content": q}] for q in questions], greedy)):
            print(f"{question}\n  {output.outputs[0].text}")


if __name__ == "__main__":
    main()
