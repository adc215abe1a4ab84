/* openai-node as its users call it. Arguments: the address that ends in /v1, the model, the question. */

import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

import { runAll, use } from "./uses.mjs";

const [baseURL, model, question] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [
  { role: "system", content: "Be short." },
  { role: "user", content: question },
];
const asked = { model, messages, temperature: 0, max_tokens: 100 };
const Mood = z.object({ mood: z.enum(["calm", "cross"]), age: z.number().int().min(0).max(99) });
const Look = z.object({ at: z.enum(["sea", "moon"]) });

use("models", async () => {
  const ids = [];
  for await (const { id } of client.models.list()) ids.push(id);
  return { ids, one: (await client.models.retrieve(model)).id };
});

use("chat", async () => {
  const { choices, usage } = await client.chat.completions.create({ ...asked, max_tokens: 12 });
  return { text: choices[0].message.content, finish_reason: choices[0].finish_reason, usage };
});

use("stream", async () => {
  const chunks = await client.chat.completions.create({
    ...asked,
    max_tokens: 12,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage = null;
  for await (const chunk of chunks) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { text, usage };
});

use("stream_helper", async () => {
  const stream = client.chat.completions.stream({ ...asked, max_tokens: 12, stream_options: { include_usage: true } });
  let deltas = "";
  stream.on("content.delta", ({ delta }) => (deltas += delta));
  const text = await stream.finalContent();
  return { text, deltas, usage: await stream.totalUsage() };
});

use("left_early", async () => {
  const chunks = await client.chat.completions.create({ ...asked, max_tokens: 1000, stream: true });
  for await (const chunk of chunks) if (chunk.choices[0]?.delta?.content) break;
  const { choices } = await client.chat.completions.create({ ...asked, max_tokens: 12 });
  return { aborted: chunks.controller.signal.aborted, text: choices[0].message.content };
});

use("parse", async () => {
  const { choices } = await client.chat.completions.parse({ ...asked, response_format: zodResponseFormat(Mood, "mood") });
  return choices[0].message.parsed;
});

use("parse_streamed", async () => {
  const stream = client.chat.completions.stream({ ...asked, response_format: zodResponseFormat(Mood, "mood") });
  return (await stream.finalChatCompletion()).choices[0].message.parsed;
});

use("tool_parsed", async () => {
  const { choices } = await client.chat.completions.parse({
    ...asked,
    tools: [zodFunction({ name: "look", parameters: Look })],
    tool_choice: { type: "function", function: { name: "look" } },
  });
  return choices[0].message.tool_calls.map(({ function: { name, parsed_arguments } }) => ({ name, parsed_arguments }));
});

use("tool_streamed", async () => {
  const stream = client.chat.completions.stream({
    ...asked,
    tools: [zodFunction({ name: "look", parameters: Look })],
    tool_choice: "required",
    parallel_tool_calls: false,
  });
  let deltas = "";
  stream.on("tool_calls.function.arguments.delta", ({ arguments_delta }) => (deltas += arguments_delta));
  const { choices } = await stream.finalChatCompletion();
  const { tool_calls } = choices[0].message;
  return { deltas, finish_reason: choices[0].finish_reason, calls: tool_calls.map((call) => call.function) };
});

use("tools_run", async () => {
  const seen = [];
  const look = ({ at }) => {
    seen.push(at);
    return `The ${at} is bright.`;
  };
  const runner = client.chat.completions.runTools({
    ...asked,
    tools: [zodFunction({ name: "look", parameters: Look, function: look })],
    tool_choice: { type: "function", function: { name: "look" } },
  });
  await runner.done();
  return { seen, roles: runner.messages.map(({ role }) => role) };
});

use("completions", async () => {
  const prompt = "In the beginning";
  const { choices } = await client.completions.create({ model, prompt, temperature: 0, max_tokens: 8 });
  return choices[0].text;
});

use("refusals", async () => {
  const refused = (body) =>
    client.chat.completions.create({ ...asked, ...body }).then(
      () => null,
      (error) => ({ name: error.constructor.name, status: error.status, code: error.code, param: error.param }),
    );
  return {
    model: await refused({ model: "another" }),
    field: await refused({ modalities: ["text", "audio"] }),
    too_long: await refused({ messages: [{ role: "user", content: "fox ".repeat(3000) }] }),
  };
});

await runAll();
