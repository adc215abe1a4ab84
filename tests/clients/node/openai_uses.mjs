/* openai-node as its users call it. Arguments: the address that ends in /v1, the model, a question, another that follows it,
and texts as a JSON list. */

import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

import { runAll, use } from "./uses.mjs";

const [baseURL, model, question, andThen, listOfTexts] = process.argv.slice(2);
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

const responding = { model, input: question, instructions: "Be short.", temperature: 0, max_output_tokens: 100 };

/* Every delta of one kind, joined. */
const joined = (events, type) =>
  events
    .filter((event) => event.type === type)
    .map(({ delta }) => delta)
    .join("");

use("response", async () => {
  const response = await client.responses.create({ ...responding, max_output_tokens: 12 });
  const { output_text, usage, status, incomplete_details } = response;
  return { text: output_text, usage, status, reason: incomplete_details.reason };
});

use("response_streamed", async () => {
  const events = [];
  const stream = await client.responses.create({ ...responding, max_output_tokens: 12, stream: true });
  for await (const event of stream) events.push(event);
  const done = events.find(({ type }) => type === "response.output_text.done");
  const { response } = events.at(-1);
  return {
    types: events.map(({ type }) => type),
    numbers: events.map(({ sequence_number }) => sequence_number),
    deltas: joined(events, "response.output_text.delta"),
    done: done.text,
    text: response.output.flatMap(({ content }) => content.map(({ text }) => text)).join(""),
    usage: response.usage,
    status: response.status,
    same: JSON.stringify((await client.responses.retrieve(response.id)).output) === JSON.stringify(response.output),
  };
});

use("response_stream_helper", async () => {
  const stream = client.responses.stream({ ...responding, max_output_tokens: 12 });
  let deltas = "";
  stream.on("response.output_text.delta", ({ delta }) => (deltas += delta));
  const { output_text, usage, status } = await stream.finalResponse();
  return { text: output_text, deltas, usage, status };
});

use("response_left_early", async () => {
  const stream = await client.responses.create({ ...responding, max_output_tokens: 1000, stream: true });
  for await (const { type } of stream) if (type === "response.output_text.delta") break;
  const { output_text } = await client.responses.create({ ...responding, max_output_tokens: 12 });
  return { aborted: stream.controller.signal.aborted, text: output_text };
});

use("response_goes_on", async () => {
  const asked = { ...responding, instructions: null, max_output_tokens: 12 };
  const first = await client.responses.create(asked);
  const second = await client.responses.create({ ...asked, input: andThen, previous_response_id: first.id });
  const items = [];
  for await (const item of client.responses.inputItems.list(second.id, { order: "asc", limit: 2 })) items.push(item);
  await client.responses.delete(first.id);
  const gone = await client.responses.retrieve(first.id).catch((error) => error.constructor.name);
  return {
    texts: [first.output_text, second.output_text],
    went_in: items.map(({ content: [{ text }] }) => text),
    gone,
  };
});

use("response_parsed", async () => {
  const asked = { ...responding, text: { format: zodTextFormat(Mood, "mood") } };
  const { output_parsed } = await client.responses.parse(asked);
  const streamed = await client.responses.stream(asked).finalResponse();
  return { whole: output_parsed, streamed: streamed.output_parsed };
});

use("response_tool_parsed", async () => {
  const { output, status } = await client.responses.parse({
    ...responding,
    tools: [zodResponsesFunction({ name: "look", parameters: Look })],
    tool_choice: { type: "function", name: "look" },
  });
  return { status, calls: output.map(({ type, name, parsed_arguments }) => ({ type, name, parsed_arguments })) };
});

use("response_tool_streamed", async () => {
  const events = [];
  const stream = await client.responses.create({
    ...responding,
    tools: [zodResponsesFunction({ name: "look", parameters: Look })],
    tool_choice: "required",
    parallel_tool_calls: false,
    stream: true,
  });
  for await (const event of stream) events.push(event);
  const added = events.find(({ type }) => type === "response.output_item.added");
  const done = events.find(({ type }) => type === "response.function_call_arguments.done");
  return {
    types: events.map(({ type }) => type),
    added: added.item,
    deltas: joined(events, "response.function_call_arguments.delta"),
    done: done.arguments,
    output: events.at(-1).response.output,
  };
});

use("response_tool_answered", async () => {
  const tools = [zodResponsesFunction({ name: "look", parameters: Look })];
  const asked = { ...responding, tools };
  const called = await client.responses.create({ ...asked, tool_choice: "required", parallel_tool_calls: false });
  const result = { type: "function_call_output", call_id: called.output[0].call_id, output: "It is bright." };
  const by_id = await client.responses.create({
    ...asked,
    input: [result],
    previous_response_id: called.id,
    tool_choice: "none",
  });
  const input = [{ role: "user", content: question }, ...called.output, result];
  const by_items = await client.responses.create({ ...asked, input, tool_choice: "none" });
  return { by_id: by_id.output_text, by_items: by_items.output_text };
});

use("response_refusals", async () => {
  const refused = (body) =>
    client.responses.create({ ...responding, ...body }).then(
      () => null,
      (error) => ({ name: error.constructor.name, status: error.status, code: error.code, param: error.param }),
    );
  return {
    model: await refused({ model: "another" }),
    field: await refused({ truncation: "auto" }),
    too_long: await refused({ input: "fox ".repeat(3000) }),
    too_long_streamed: await refused({ input: "fox ".repeat(3000), stream: true }),
    forgotten: await refused({ previous_response_id: `resp_${"0".repeat(48)}` }),
  };
});

const texts = JSON.parse(listOfTexts);

/* Asked for without a word about the form, they travel in base64 and are given as numbers. */
for (const [name, form] of [["default", {}], ["float", { encoding_format: "float" }], ["base64", { encoding_format: "base64" }]]) {
  use(`embedded_${name}`, async () => {
    const { data, usage } = await client.embeddings.create({ model, input: texts, ...form });
    const vectors = data.map(({ embedding }) => (typeof embedding === "string" ? embedding : [...embedding]));
    return { vectors, usage, order: data.map(({ index }) => index) };
  });
}

use("embedded_tokens", async () => {
  const { data } = await client.embeddings.create({ model, input: [[7, 8, 9], [1000]] });
  return data.map(({ embedding }) => [...embedding]);
});

use("embedding_refusals", async () => {
  const refused = (body) =>
    client.embeddings.create({ model, input: texts, ...body }).then(
      () => null,
      (error) => ({ name: error.constructor.name, code: error.code, param: error.param }),
    );
  return {
    model: await refused({ model: "another" }),
    dimensions: await refused({ dimensions: 8 }),
    too_long: await refused({ input: "fox ".repeat(3000) }),
  };
});

await runAll();
