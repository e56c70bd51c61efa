// Prints what llama.cpp predicts after some tokens: `llama-logits MODEL.gguf ID ...` writes float32 logits to standard output.
//
// llama-bench times but shows no result; this is how plait bench checks that both sides run the same model.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

static void quiet(ggml_log_level, const char *, void *) {}

int main(int argc, char ** argv) {
    if (argc < 3) {
        std::fprintf(stderr, "usage: llama-logits MODEL.gguf ID ...\n");
        return 2;
    }
    llama_log_set(quiet, nullptr);
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        std::fprintf(stderr, "%s: cannot be loaded\n", argv[1]);
        return 1;
    }
    std::vector<llama_token> ids;
    for (int i = 2; i < argc; i++) ids.push_back(std::atoi(argv[i]));
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = ids.size() + 1;
    params.n_threads = params.n_threads_batch = 1;
    llama_context * context = llama_init_from_model(model, params);
    if (!context || llama_decode(context, llama_batch_get_one(ids.data(), ids.size()))) {
        std::fprintf(stderr, "cannot run the model\n");
        return 1;
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::fwrite(llama_get_logits_ith(context, -1), sizeof(float), n_vocab, stdout);
    llama_free(context);
    llama_model_free(model);
}
