/* Vercel's AI SDK as its users call it, with both of its providers that take an address. Arguments: as openai_uses. */

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embed, embedMany, generateObject, generateText, isStepCount, Output, streamObject, streamText, tool } from "ai";
import { z } from "zod";

import { runAll, use } from "./uses.mjs";

const [baseURL, name, question, andThen, listOfTexts] = process.argv.slice(2);
globalThis.AI_SDK_LOG_WARNINGS = false;

const compatible = createOpenAICompatible({
  name: "stator",
  baseURL,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL, apiKey: "none" });
const providers = {
  compatible: (id) => compatible(id),
  openai: (id) => openai.chat(id),
  responses: (id) => openai.responses(id),
};

const schema = z.object({ mood: z.enum(["calm", "cross"]), age: z.number().int().min(0).max(99) });
const look = tool({
  description: "Look at something.",
  inputSchema: z.object({ at: z.enum(["sea", "moon"]) }),
  execute: async ({ at }) => `The ${at} is bright.`,
});

for (const [provider, choose] of Object.entries(providers)) {
  // The bundled model does not stop calling; both providers pass this on, each under its own name for it.
  const once = { stator: { parallel_tool_calls: false }, openai: { parallelToolCalls: false } };
  const plain = { model: choose(name), prompt: question, temperature: 0, maxOutputTokens: 100, maxRetries: 0 };
  const short = { ...plain, instructions: "Be short.", maxOutputTokens: 12 };
  const as = (what, give) => use(`${provider}_${what}`, give);

  as("text", async () => {
    const { text, usage, finishReason, warnings } = await generateText(short);
    return { text, usage, finishReason, warnings };
  });

  as("text_streamed", async () => {
    let text = "";
    let failed = null;
    const result = streamText({ ...short, onError: ({ error }) => (failed = String(error)) });
    for await (const part of result.textStream) text += part;
    return { text, failed, usage: await result.usage, finishReason: await result.finishReason };
  });

  as("object", async () => (await generateObject({ ...plain, schema })).object);

  as("object_as_output", async () => (await generateText({ ...plain, output: Output.object({ schema }) })).output);

  as("choice_as_output", async () => {
    const output = Output.choice({ options: ["calm", "cross"] });
    return (await generateText({ ...plain, output })).output;
  });

  as("object_streamed", async () => {
    const { partialObjectStream, object } = streamObject({ ...plain, schema });
    for await (const part of partialObjectStream) if (part === undefined) throw new Error("a part of nothing");
    return object;
  });

  as("tool", async () => {
    const { toolCalls, toolResults, finishReason } = await generateText({
      ...plain,
      tools: { look },
      toolChoice: "required",
      providerOptions: once,
    });
    return {
      calls: toolCalls.map(({ toolName, input }) => ({ toolName, input })),
      results: toolResults.map(({ output }) => output),
      finishReason,
    };
  });

  as("tool_streamed", async () => {
    const result = streamText({ ...plain, tools: { look }, toolChoice: { type: "tool", toolName: "look" } });
    const kinds = [];
    let deltas = "";
    for await (const part of result.fullStream) {
      kinds.push(part.type);
      if (part.type === "tool-input-delta") deltas += part.delta;
    }
    const calls = await result.toolCalls;
    return { kinds: [...new Set(kinds)], deltas, calls: calls.map(({ toolName, input }) => ({ toolName, input })) };
  });

  as("steps", async () => {
    const { steps, text } = await generateText({
      ...plain,
      tools: { look },
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
      providerOptions: once,
      stopWhen: isStepCount(2),
    });
    return { finishReasons: steps.map(({ finishReason }) => finishReason), text };
  });

  as("refusals", async () => {
    const refused = (settings) =>
      generateText({ ...plain, ...settings }).then(
        () => null,
        (error) => ({ api: APICallError.isInstance(error), status: error.statusCode, message: error.message }),
      );
    return {
      model: await refused({ model: choose("another") }),
      too_long: await refused({ prompt: "fox ".repeat(3000) }),
    };
  });
}

/* What only responses have: they are kept. */
const kept = { model: openai.responses(name), temperature: 0, maxOutputTokens: 12, maxRetries: 0 };

use("goes_on_by_id", async () => {
  const first = await generateText({ ...kept, prompt: question });
  const { responseId } = first.providerMetadata.openai;
  const goesOn = { openai: { previousResponseId: responseId } };
  const second = await generateText({ ...kept, prompt: andThen, providerOptions: goesOn });
  return { texts: [first.text, second.text], id: responseId };
});

/* The first answer goes back as a reference to its item, or as its text. */
for (const store of [true, false]) {
  use(store ? "goes_on_by_reference" : "goes_on_by_text", async () => {
    const providerOptions = { openai: { store } };
    const messages = [{ role: "user", content: question }];
    const first = await generateText({ ...kept, messages, providerOptions });
    messages.push(...first.response.messages, { role: "user", content: andThen });
    const second = await generateText({ ...kept, messages, providerOptions, include: { requestBody: true } });
    return { texts: [first.text, second.text], sent: second.request.body.input.map(({ type, role }) => type ?? role) };
  });
}

const texts = JSON.parse(listOfTexts);
for (const [provider, model] of [["compatible", compatible.embeddingModel(name)], ["openai", openai.embedding(name)]]) {
  use(`${provider}_embedded`, async () => {
    const { embeddings, usage } = await embedMany({ model, values: texts, maxRetries: 0 });
    const single = await embed({ model, value: texts[0], maxRetries: 0 });
    return { vectors: embeddings, tokens: usage.tokens, single: single.embedding };
  });

  use(`${provider}_embedding_refusals`, async () => {
    const refused = (settings) =>
      embedMany({ model, values: texts, maxRetries: 0, ...settings }).then(
        () => null,
        (error) => ({ api: APICallError.isInstance(error), status: error.statusCode, message: error.message }),
      );
    return {
      too_long: await refused({ values: ["fox ".repeat(3000)] }),
      dimensions: await refused({ providerOptions: { [provider === "openai" ? "openai" : "stator"]: { dimensions: 8 } } }),
    };
  });
}

await runAll();
