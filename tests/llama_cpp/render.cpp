// Renders chat templates as llama-server does, for tests: cases as JSON on stdin, their prompts as a JSON array on stdout.

#include "chat.h"
#include "json.h"

#include <iostream>
#include <iterator>

int main() {
    const std::string raw((std::istreambuf_iterator<char>(std::cin)), std::istreambuf_iterator<char>());
    common_json prompts = common_json::array();
    for (auto question : common_json::parse(raw)) {
        auto templates = common_chat_templates_init(nullptr, question["template"].get<std::string>(),
                                                    question["bos"].get<std::string>(), question["eos"].get<std::string>());
        common_chat_templates_inputs inputs;
        common_json messages = question["messages"];
        inputs.messages = common_chat_msgs_parse_oaicompat(messages);
        inputs.add_generation_prompt = question["prompt"].get<bool>();
        prompts.push_back(common_chat_templates_apply(templates.get(), inputs).prompt);
    }
    std::cout << prompts.dump();
}
