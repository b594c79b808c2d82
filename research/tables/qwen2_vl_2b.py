"""Qwen2-VL-2B at the published shares, with general, text-reading and grounding tasks; see table.py."""

from table import Row, Table, at_true_budgets, run

TABLE = Table(
    title="Qwen2-VL-2B, as many vision tokens as the picture has, published shares of arXiv 2508.06084 and true shares",
    model="Qwen/Qwen2-VL-2B-Instruct",
    tasks=("gqa", "mme", "pope", "scienceqa_img", "textvqa_val", "docvqa_val", "seedbench"),
    rows=(
        Row("vanilla"),
        Row("paper 50 %", "preset=qwen2-vl-2b/50"),
        Row("paper 30 %", "preset=qwen2-vl-2b/30"),
        Row("paper 10 %", "preset=qwen2-vl-2b/10"),
        *at_true_budgets(0.33, 0.22, 0.11),
    ),
)

if __name__ == "__main__":
    run(TABLE)
