-- Puts a dead letter's payload back at the end of its queue.
-- KEYS[1]  dead letters (list)    KEYS[2]  queue (list)
-- ARGV[1]  the dead letter    ARGV[2]  the payload to push, whose counts start anew
-- Returns 1, or 0 if the dead letter is gone; an error that names the queue if it is no list.
local dead, queue = KEYS[1], KEYS[2]
local letter, payload = ARGV[1], ARGV[2]

local kind = redis.call('TYPE', queue).ok
if kind ~= 'list' and kind ~= 'none' then
  return redis.error_reply('WRONGTYPE ' .. queue .. ' is a ' .. kind .. ', not a list')
end
if not redis.call('LPOS', dead, letter, 'RANK', -1) then return 0 end
-- It is pushed before it is removed: a script is not rolled back when one of its commands fails.
redis.call('RPUSH', queue, payload)
redis.call('LREM', dead, -1, letter)
return 1
