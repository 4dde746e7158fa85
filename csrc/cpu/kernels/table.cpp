#include "cpu/kernels/table.h"

#include "cpu/kernels/integers.h"
#include "cpu/kernels/quantized_rows.h"
#include "cpu/kernels/tile.h"

#define DG_TEXT(name) #name
#define DG_TEXT_OF(macro) DG_TEXT(macro)

namespace dg::DG_LEVEL {

const Kernels *kernels() {
    static const Kernels table = {
        DG_TEXT_OF(DG_LEVEL),
        COLUMNS,
        form_for,
        block_floats,
        product_scratch,
        attention_scratch,
        self_conditioning_scratch,
        decode,
        run_pack,
        run_quantize,
        run_multiply,
        run_gated,
        run_low,
        run_experts,
        run_combine,
        run_norm,
        run_attention,
        run_look,
        run_weigh,
        run_add,
        run_finish,
        look_at,
        sum_logits,
        scale_logits,
    };
    return &table;
}

} // namespace dg::DG_LEVEL
