-- Moves payloads of a dead supervisor from one of its lanes to the front of their queue, the first
-- one foremost.
-- KEYS[1]  lane (list)    KEYS[2]  queue (list)    KEYS[3]  stats (hash)
-- ARGV     payload, new, …    pairs; `new` is the same payload, or counts one redelivery more
-- Returns how many were moved; what another rescuer was faster with is not moved again.
local lane, queue, stats = KEYS[1], KEYS[2], KEYS[3]
local moved, redelivered = 0, 0
-- Before anything is removed that could not be pushed.
local kind = redis.call('TYPE', queue).ok
if kind ~= 'list' and kind ~= 'none' then
  return redis.error_reply('WRONGTYPE ' .. queue .. ' is a ' .. kind .. ', not a list')
end
for i = #ARGV - 1, 1, -2 do
  if redis.call('LREM', lane, -1, ARGV[i]) == 1 then
    redis.call('LPUSH', queue, ARGV[i + 1])
    moved = moved + 1
    if ARGV[i] ~= ARGV[i + 1] then redelivered = redelivered + 1 end
  end
end
if redelivered > 0 then redis.pcall('HINCRBY', stats, 'redelivered', redelivered) end
return moved
