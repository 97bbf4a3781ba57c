"""What the page says, in Chinese and English."""

LANGUAGES = {"zh": "中文", "en": "English"}

WORDS = {
    "question": {"zh": "问题", "en": "Question"},
    "ask_here": {
        "zh": "输入问题，Enter 发送，Shift+Enter 换行",
        "en": "Ask something. Enter sends, Shift+Enter starts a new line",
    },
    "empty": {"zh": "对话只在这台电脑上进行。", "en": "The conversation stays on this computer."},
    "send": {"zh": "发送", "en": "Send"},
    "stop": {"zh": "停止", "en": "Stop"},
    "again": {"zh": "重新生成", "en": "Regenerate"},
    "undo": {"zh": "撤销", "en": "Undo"},
    "clear": {"zh": "清空", "en": "Clear"},
    "system": {"zh": "系统提示", "en": "System prompt"},
    "system_info": {"zh": "模型最先读到的话；留空则用模型自己的。", "en": "Read first; empty = the model's own."},
    "sampling": {"zh": "采样", "en": "Sampling"},
    "temperature": {"zh": "温度", "en": "Temperature"},
    "top_p": {"zh": "Top-p", "en": "Top-p"},
    "top_k": {"zh": "Top-k", "en": "Top-k"},
    "min_p": {"zh": "Min-p", "en": "Min-p"},
    "repeat_penalty": {"zh": "重复惩罚", "en": "Repetition"},
    "max_tokens": {"zh": "回答长度上限", "en": "Max tokens"},
    "export": {"zh": "导出对话", "en": "Export"},
    "busy": {"zh": "模型正忙，请 {seconds} 秒后再试。", "en": "The model is busy. Try again in {seconds} s."},
    "stopping": {"zh": "服务正在停止。", "en": "The server is stopping."},
    "error": {"zh": "出错了：{error}", "en": "Error: {error}"},
    "forgets": {
        "zh": "上下文已满：模型不再看到最早的 {n} 轮对话。",
        "en": "The context is full. Turns the model forgets: {n}.",
    },
    "full": {"zh": "上下文已满，回答到此为止。", "en": "The context is full, and the answer ends here."},
    "note": {"zh": "注意", "en": "Note"},
    "user": {"zh": "用户", "en": "User"},
    "assistant": {"zh": "模型", "en": "Model"},
    "system_role": {"zh": "系统", "en": "System"},
}


def say(word: str, language: str, **values: object) -> str:
    return WORDS[word][language].format(**values)


def language_of(accepted: str) -> str:
    """The language of the page for an Accept-Language header: Chinese where it is wanted before English, and by default."""
    wanted = [part.partition(";")[0].strip().lower()[:2] for part in accepted.split(",")]
    return next((language for language in wanted if language in LANGUAGES), "zh")
