"""LLaVA-1.5-13B at the published labels; the paper does not print its schedule, ours fits the labels. See table.py."""

from table import LLAVA_TASKS, Row, Table, at_true_budgets, run

TABLE = Table(
    title="LLaVA-1.5-13B, 576 vision tokens, schedules that fit the labels of arXiv 2508.06084, and true budgets",
    model="llava-hf/llava-1.5-13b-hf",
    tasks=LLAVA_TASKS,
    rows=(
        Row("vanilla", true_average=576),
        Row("paper 128", "preset=llava-1.5-13b/128", true_average=142.4),
        Row("paper 64", "preset=llava-1.5-13b/64", true_average=78.9),
        *at_true_budgets(192, 128, 64),
    ),
)

if __name__ == "__main__":
    run(TABLE)
